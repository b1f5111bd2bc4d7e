"""Muon for matrices, Adam for embedding, head, norms and routers; both driven by one schedule factor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .network import Network

MUON_RATE = 0.018
MUON_MOMENTUM = 0.95
MUON_DECAY = 0.02
ADAM_RATES = {"embed": 0.007, "head": 0.0035}
ADAM_RATE_OTHERS = 0.003
ADAM_BETAS = (0.9, 0.97)
WARM_STEPS = 60
DECAY_SHARE = 0.45
FINAL_SCALE = 0.02
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def schedule(step: int, progress: float) -> float:
    """Learning-rate factor: short warm-up, constant, linear decay over the last DECAY_SHARE of the run."""
    decay = max(FINAL_SCALE, min(1.0, (1 - progress) / DECAY_SHARE))
    return min(1.0, (step + 1) / WARM_STEPS) * decay


@dataclass(slots=True)
class _Slot:
    """One parameter and its running averages; `second` is used by Adam only."""

    parameter: Tensor
    first: Tensor
    second: Tensor


class Optimizer:
    """Owns the running averages of every parameter; `step` consumes and clears the gradients."""

    def __init__(self, network: Network) -> None:
        self._muon: dict[str, _Slot] = {}
        self._adam: dict[str, _Slot] = {}
        self._steps = 0
        for name, parameter in network.named_parameters():
            slots = self._muon if _is_matrix(name, parameter) else self._adam
            slots[name] = _Slot(parameter, torch.zeros_like(parameter), torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with every rate multiplied by `scale`."""
        self._steps += 1
        torch.nn.utils.clip_grad_norm_([slot.parameter for slot in self._adam.values()], 1.0)
        for name, slot in self._adam.items():
            _adam_update(slot, ADAM_RATES.get(name, ADAM_RATE_OTHERS) * scale, self._steps)
        self._muon_update(MUON_RATE * scale)
        for slot in (*self._adam.values(), *self._muon.values()):
            slot.parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as named tensors."""
        slots = self._adam | self._muon
        averages = {f"first.{name}": slot.first for name, slot in slots.items()}
        averages |= {f"second.{name}": slot.second for name, slot in self._adam.items()}
        return averages | {"steps": torch.tensor(self._steps)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        self._steps = int(state["steps"])
        for name, slot in (self._adam | self._muon).items():
            slot.first.copy_(state[f"first.{name}"])
            if name in self._adam:
                slot.second.copy_(state[f"second.{name}"])

    def _muon_update(self, rate: float) -> None:
        same_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for name, slot in self._muon.items():
            grad = slot.parameter.grad
            if grad is None:
                continue
            slot.first.lerp_(grad, 1 - MUON_MOMENTUM)
            update = grad.lerp(slot.first, MUON_MOMENTUM)
            parts = 2 if name.endswith("gate_up") else 1  # gate and up are two matrices stored as one
            for weight, part in zip(slot.parameter.chunk(parts, -2), update.chunk(parts, -2), strict=True):
                weight, part = weight.view(-1, *weight.shape[-2:]), part.reshape(-1, *part.shape[-2:])
                same_shape.setdefault(part.shape[1:], []).append((weight, part))
        for shape, pairs in same_shape.items():
            updates = orthogonalize(torch.cat([part for _, part in pairs]))
            size = max(1.0, shape[0] / shape[1]) ** 0.5
            for (weight, _), update in zip(pairs, updates.split([len(part) for _, part in pairs]), strict=True):
                weight.mul_(1 - rate * MUON_DECAY).add_(update, alpha=-rate * size)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration: each matrix of the batch with its singular values pushed towards 1."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.transpose(-1, -2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=-1)[:, None, None] + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(-1, -2) if tall else x


def _adam_update(slot: _Slot, rate: float, steps: int) -> None:
    if slot.parameter.grad is None:
        return
    beta1, beta2 = ADAM_BETAS
    slot.first.lerp_(slot.parameter.grad, 1 - beta1)
    slot.second.lerp_(slot.parameter.grad.square(), 1 - beta2)
    spread = (slot.second / (1 - beta2**steps)).sqrt_().add_(1e-8)
    slot.parameter.addcdiv_(slot.first, spread, value=-rate / (1 - beta1**steps))


def _is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and name not in ADAM_RATES and not name.endswith("experts.gate")
