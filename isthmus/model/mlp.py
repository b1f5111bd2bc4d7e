"""The two feed-forward blocks: dense, and a mixture of experts with an optional shared expert."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.model.linear import Fp8Linear, Linear
from kernels.elementwise.definition import rms_norm, swiglu
from kernels.experts.definition import ChosenExperts, Matrices, RouterRule, expert_mlps, route
from kernels.products.definition import grouped_matmul


@dataclass(frozen=True, slots=True)
class DenseMlp:
    gate_up: Linear | Fp8Linear  # D to 2 * width, gate first
    down: Linear | Fp8Linear

    def forward(self, x_ND: Tensor, num_rows: int, *, group: int) -> Tensor:
        """[N, D] for all rows; `num_rows` (those that are no padding) is for blocks whose cost depends on it."""
        return self.down.forward(swiglu(self.gate_up.forward(x_ND, group=group)), group=group)


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    router: Tensor  # [D, E] in the dtype its product is computed in
    bias: Tensor | None  # [E] fp32; None where the checkpoint has none
    rule: RouterRule
    gate_up: Matrices  # per expert [D, 2 * width], gate first
    down: Matrices
    shared: DenseMlp | None
    norm: Tensor | None  # [D] of the output (A.X-K1)
    norm_eps: float

    def forward(self, x_ND: Tensor, num_rows: int, *, group: int) -> Tensor:
        """[N, D]; padding rows get the shared expert alone, or zeros."""
        routing = self.route(x_ND, group=group)
        routing = ChosenExperts(routing.weights_NA.narrow(0, 0, num_rows), routing.expert_ids_NA.narrow(0, 0, num_rows))
        routed = expert_mlps(x_ND, routing, self.gate_up, self.down).to(x_ND.dtype)
        out = torch.zeros_like(x_ND) if self.shared is None else self.shared.forward(x_ND, num_rows, group=group)
        out.narrow(0, 0, num_rows).add_(routed)
        return out if self.norm is None else rms_norm(out, self.norm, eps=self.norm_eps)

    def route(self, x_ND: Tensor, *, group: int) -> ChosenExperts:
        """The scores are fp32 in any case: a rounding step here picks another expert."""
        logits = grouped_matmul(x_ND.to(self.router.dtype), self.router, group=group)
        return route(logits.float(), self.bias, self.rule)


Mlp = DenseMlp | ExpertsMlp
