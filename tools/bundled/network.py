"""The model as it is trained: DeepSeek-V3 mathematics (MLA, grouped sigmoid router, YaRN) plus one MTP layer, in fp32.

Shape suffixes: B rows, T positions, N = B*T tokens, D hidden, H heads. Parameter names are those of the published
checkpoints, except that gate/up projections and experts are fused; `checkpoint.py` splits them.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import CausalAttention
from .tokens import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the bundled model; `checkpoint.config_dict` writes the same numbers to config.json."""

    hidden: int = 192
    layers: int = 4
    dense_layers: int = 1
    heads: int = 4
    q_lora: int = 96
    kv_lora: int = 64
    nope: int = 48
    rope: int = 16
    value: int = 32
    dense_width: int = 512
    expert_width: int = 128
    experts: int = 16
    experts_per_token: int = 2
    groups: int = 4
    groups_kept: int = 2
    routed_scale: float = 1.5
    rope_theta: float = 10000.0
    yarn_factor: float = 4.0
    yarn_original: int = 512
    max_positions: int = 2048
    eps: float = 1e-6


SHAPE = Shape()


class Losses(NamedTuple):
    """Weighted mean cross-entropies in nats per token; `mtp` is None when no row was given to the MTP layer."""

    main: Tensor
    mtp: Tensor | None


class Network(nn.Module):
    """Main model and MTP layer, sharing embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = _matrix(VOCAB_SIZE, SHAPE.hidden, std=0.3)
        self.head = nn.Parameter(torch.zeros(VOCAB_SIZE, SHAPE.hidden))
        self.layers = nn.ModuleList(Layer(routed=index >= SHAPE.dense_layers) for index in range(SHAPE.layers))
        self.norm = _ones(SHAPE.hidden)
        self.mtp = MtpLayer()
        angles = torch.outer(torch.arange(SHAPE.max_positions).float(), yarn_frequencies())
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Hidden states after the final norm."""
        x_BTD = F.embedding(ids_BT, self.embed)
        for layer in self.layers:
            x_BTD = layer(x_BTD, self.cos, self.sin)
        return rms(x_BTD, self.norm)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Next-token logits of every position."""
        return F.linear(self(ids_BT), self.head)

    def drafts(self, h_BTD: Tensor, next_ids_BT: Tensor) -> Tensor:
        """The MTP layer's choice for the token after next, given the final hidden states and the next tokens."""
        drafted_BTD = self.mtp(h_BTD, F.embedding(next_ids_BT, self.embed), self.cos, self.sin)
        return F.linear(drafted_BTD, self.head).argmax(-1)

    def losses(self, ids_BT: Tensor, weights_BT: Tensor, *, mtp_rows: int) -> Losses:
        """Cross-entropy of the next token for all rows and of the one after it for the first `mtp_rows` rows."""
        h_BTD = self(ids_BT[:, :-2])
        main = self._cross_entropy(h_BTD, ids_BT[:, 1:-1], weights_BT[:, 1:-1])
        if not mtp_rows:
            return Losses(main, None)
        ids_BT, weights_BT = ids_BT[:mtp_rows], weights_BT[:mtp_rows]
        drafted_BTD = self.mtp(h_BTD[:mtp_rows], F.embedding(ids_BT[:, 1:-1], self.embed), self.cos, self.sin)
        return Losses(main, self._cross_entropy(drafted_BTD, ids_BT[:, 2:], weights_BT[:, 2:]))

    def _cross_entropy(self, h_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor) -> Tensor:
        logits_NV = F.linear(h_BTD.flatten(0, 1), self.head)
        losses_N = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="none")
        weights_N = weights_BT.flatten()
        return (losses_N * weights_N).sum() / weights_N.sum()

    def routers(self) -> list["RoutedExperts"]:
        """Every router, the MTP layer's included, for load balancing."""
        return [module for module in self.modules() if isinstance(module, RoutedExperts)]


class MtpLayer(nn.Module):
    """Predicts token t+2 from the hidden state at t and the embedding of token t+1."""

    def __init__(self) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.norm = (_ones(SHAPE.hidden) for _ in range(3))
        self.eh_proj = _matrix(SHAPE.hidden, 2 * SHAPE.hidden)
        self.block = Layer(routed=True)

    def forward(self, h_BTD: Tensor, embedding_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        both = torch.cat((rms(embedding_BTD, self.enorm), rms(h_BTD, self.hnorm)), -1)
        return rms(self.block(F.linear(both, self.eh_proj), cos, sin), self.norm)


class Layer(nn.Module):
    """Attention, then a dense MLP or a shared expert plus routed experts."""

    def __init__(self, *, routed: bool) -> None:
        super().__init__()
        width = SHAPE.expert_width if routed else SHAPE.dense_width
        self.input_norm = _ones(SHAPE.hidden)
        self.post_norm = _ones(SHAPE.hidden)
        self.attention = Attention()
        self.gate_up = _matrix(2 * width, SHAPE.hidden)
        self.down = nn.Parameter(torch.zeros(SHAPE.hidden, width))
        self.experts = RoutedExperts() if routed else None

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(rms(x_BTD, self.input_norm), cos, sin)
        n_BTD = rms(x_BTD, self.post_norm)
        out_BTD = F.linear(gated(F.linear(n_BTD, self.gate_up)), self.down)
        if self.experts is not None:
            out_BTD = out_BTD + self.experts(n_BTD.flatten(0, 1)).view_as(x_BTD)
        return x_BTD + out_BTD


class Attention(nn.Module):
    """Multi-head latent attention in its expanded form."""

    def __init__(self) -> None:
        super().__init__()
        s = SHAPE
        self.q_a = _matrix(s.q_lora, s.hidden)
        self.q_b = _matrix(s.heads * (s.nope + s.rope), s.q_lora)
        self.kv_a = _matrix(s.kv_lora + s.rope, s.hidden)
        self.kv_b = _matrix(s.heads * (s.nope + s.value), s.kv_lora)
        self.q_norm = _ones(s.q_lora)
        self.kv_norm = _ones(s.kv_lora)
        self.o = nn.Parameter(torch.zeros(s.hidden, s.heads * s.value))

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        s = SHAPE
        rows, length, _ = x_BTD.shape
        cos, sin = cos[:length, None], sin[:length, None]
        query = F.linear(rms(F.linear(x_BTD, self.q_a), self.q_norm), self.q_b).view(rows, length, s.heads, -1)
        latent, k_pe = F.linear(x_BTD, self.kv_a).split((s.kv_lora, s.rope), -1)
        expanded = F.linear(rms(latent, self.kv_norm), self.kv_b).view(rows, length, s.heads, -1)
        k_nope, value = expanded.split((s.nope, s.value), -1)
        q_nope, q_pe = query.split((s.nope, s.rope), -1)
        k_pe = rotate(k_pe[:, :, None], cos, sin).expand(-1, -1, s.heads, -1)
        q_NTK = _by_head(torch.cat((q_nope, rotate(q_pe, cos, sin)), -1) * softmax_scale())
        k_NTK = _by_head(torch.cat((k_nope, k_pe), -1))
        out_NTV = CausalAttention.apply(q_NTK, k_NTK, _by_head(value))
        out = out_NTV.view(rows, s.heads, length, s.value).transpose(1, 2).flatten(2)
        return F.linear(out, self.o)


class RoutedExperts(nn.Module):
    """Group-limited top-k over sigmoid scores; `bias` steers the choice only and is moved by `balance`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = _matrix(SHAPE.experts, SHAPE.hidden, std=0.02)
        self.gate_up = _matrix(SHAPE.experts, 2 * SHAPE.expert_width, SHAPE.hidden)
        self.down = nn.Parameter(torch.zeros(SHAPE.experts, SHAPE.hidden, SHAPE.expert_width))
        self.register_buffer("bias", torch.zeros(SHAPE.experts))
        self.register_buffer("load", torch.zeros(SHAPE.experts), persistent=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        chosen_NK, weight_NK = self._route(x_ND)
        order = chosen_NK.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_NK.flatten(), minlength=SHAPE.experts)
        if self.training:
            self.load += counts
        parts = x_ND[order // SHAPE.experts_per_token].split(counts.tolist())
        hidden = torch.cat([F.linear(part, w) for part, w in zip(parts, self.gate_up.unbind(), strict=True)])
        hidden = gated(hidden) * weight_NK.flatten()[order, None]
        outs = [F.linear(h, w) for h, w in zip(hidden.split(counts.tolist()), self.down.unbind(), strict=True)]
        restored = torch.cat(outs)[order.argsort()]
        return restored.view(len(x_ND), SHAPE.experts_per_token, -1).sum(1)

    def _route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        s = SHAPE
        scores_NE = torch.sigmoid(F.linear(x_ND, self.gate))
        biased = (scores_NE.detach() + self.bias).view(-1, s.groups, s.experts // s.groups)
        kept = biased.topk(2, -1).values.sum(-1).topk(s.groups_kept, -1).indices
        allowed = torch.zeros_like(biased[..., 0], dtype=torch.bool).scatter_(1, kept, True)
        chosen_NK = biased.masked_fill(~allowed[..., None], -math.inf).flatten(1).topk(s.experts_per_token, -1).indices
        weight_NK = scores_NE.gather(1, chosen_NK)
        return chosen_NK, weight_NK / (weight_NK.sum(-1, keepdim=True) + 1e-20) * s.routed_scale

    @torch.no_grad()
    def balance(self, step: float) -> float:
        """Move the bias against the load seen since the last call; returns that load's maximum over its mean."""
        if not self.load.any():
            return 1.0
        load = self.load / self.load.mean()
        self.bias += step * torch.sign(1 - load)
        self.bias -= self.bias.mean()
        self.load.zero_()
        return float(load.max())


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last axis."""
    return F.rms_norm(x, weight.shape, weight, SHAPE.eps)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a fused projection, gate rows first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs."""
    even = x[..., 0::2]
    odd = x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def softmax_scale() -> float:
    """1/sqrt(head dim), corrected by YaRN's mscale as DeepSeek-V3 does."""
    mscale = 0.1 * math.log(SHAPE.yarn_factor) + 1
    return (SHAPE.nope + SHAPE.rope) ** -0.5 * mscale * mscale


def yarn_frequencies() -> Tensor:
    """Inverse frequencies with YaRN's ramp between beta_fast 32 and beta_slow 1."""
    s = SHAPE
    plain = s.rope_theta ** -(torch.arange(0, s.rope, 2).float() / s.rope)

    def dimension(rotations: float) -> float:
        return s.rope * math.log(s.yarn_original / (rotations * 2 * math.pi)) / (2 * math.log(s.rope_theta))

    low = max(math.floor(dimension(32)), 0)
    high = min(math.ceil(dimension(1)), s.rope - 1)
    ramp = ((torch.arange(s.rope // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / s.yarn_factor * ramp + plain * (1 - ramp)


def _by_head(x_BTHK: Tensor) -> Tensor:
    return x_BTHK.transpose(1, 2).flatten(0, 1).contiguous()


def _matrix(*shape: int, std: float | None = None) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (std if std is not None else 0.7 * shape[-1] ** -0.5))


def _ones(size: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))
