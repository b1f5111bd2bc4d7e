"""The two feed-forward blocks: dense, and a mixture of experts with an optional shared expert."""

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.model_config import Router
from kernels import ref


@dataclass(frozen=True, slots=True)
class DenseMlp:
    gate_up: Tensor  # [D, 2 * width], gate first
    down: Tensor  # [width, D]

    def forward(self, x_ND: Tensor, num_rows: int, *, group: int) -> Tensor:
        """[N, D] for all rows; `num_rows` (those that are no padding) is for blocks whose cost depends on it."""
        hidden = ref.swiglu(ref.grouped_matmul(x_ND, self.gate_up, group=group))
        return ref.grouped_matmul(hidden, self.down, group=group)


@dataclass(frozen=True, slots=True)
class ExpertsMlp:
    router: Tensor  # [D, E] fp32
    bias: Tensor | None  # [E] fp32; None where the family has none
    kind: Router
    rule: ref.RouterRule
    gate_up: tuple[Tensor, ...]  # per expert, as in DenseMlp
    down: tuple[Tensor, ...]
    shared: DenseMlp | None

    def forward(self, x_ND: Tensor, num_rows: int, *, group: int) -> Tensor:
        """[N, D]; padding rows get the shared expert alone, or zeros."""
        routing = self.route(x_ND, group=group)
        routing = ref.Routing(routing.weights_NA.narrow(0, 0, num_rows), routing.expert_ids_NA.narrow(0, 0, num_rows))
        routed = ref.expert_mlps(x_ND, routing, self.gate_up, self.down).to(x_ND.dtype)
        out = torch.zeros_like(x_ND) if self.shared is None else self.shared.forward(x_ND, num_rows, group=group)
        out.narrow(0, 0, num_rows).add_(routed)
        return out

    def route(self, x_ND: Tensor, *, group: int) -> ref.Routing:
        """Always in fp32: a rounding step here picks another expert."""
        logits = ref.grouped_matmul(x_ND.float(), self.router, group=group)
        if self.kind is Router.SOFTMAX:
            return ref.route_softmax(logits, self.rule)
        assert self.bias is not None, "a sigmoid router is loaded with its bias"
        return ref.route_sigmoid_bias(logits, self.bias, self.rule)


Mlp = DenseMlp | ExpertsMlp
