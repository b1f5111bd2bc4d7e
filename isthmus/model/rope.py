"""What depends on a position alone: rotary angles (transformers' `ROPE_INIT_FUNCTIONS`) and the scale of queries."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.checkpoint.model_config import ModelConfig
from isthmus.checkpoint.rope_config import Rope


class PositionTables(NamedTuple):
    """One row per position; cos and sin as `kernels.latents.definition.rotate` takes them."""

    cos: Tensor  # [context_length, R] in the dtype the rotation is computed in
    signed_sin: Tensor  # [context_length, R]
    query_scale: Tensor  # [context_length] fp32: 1 / sqrt(query elements) with every correction

    def at(self, positions: Tensor) -> "PositionTables":
        """Their rows, with a dimension for the heads: [N, 1, R] twice and [N, 1, 1]."""
        cos, signed_sin, query_scale = (table.index_select(0, positions).unsqueeze(1) for table in self)
        return PositionTables(cos, signed_sin, query_scale.unsqueeze(2))


def position_tables(config: ModelConfig, dtype: torch.dtype) -> PositionTables:
    rope = config.rope
    dim = config.qk_rope_head_dim
    positions = torch.arange(config.context_length, dtype=torch.float32)
    angles = positions[:, None] * _frequencies(rope, dim)
    magnitude = _magnitude(rope)
    cos = angles.cos() * magnitude
    sin = angles.sin() * magnitude
    rotation_dtype = torch.float32 if config.rotates_in_fp32 else dtype
    return PositionTables(
        torch.cat((cos, cos), dim=-1).to(rotation_dtype),
        torch.cat((-sin, sin), dim=-1).to(rotation_dtype),
        _query_scale(config, positions),
    )


def _query_scale(config: ModelConfig, positions: Tensor) -> Tensor:
    rope = config.rope
    scale = config.qk_head_dim**-0.5
    if rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    periods = (positions / rope.original_max_position_embeddings).floor()
    return scale * (1.0 + rope.llama_4_scaling_beta * (1.0 + periods).log())


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _magnitude(rope: Rope) -> float:
    """What cos and sin are multiplied by."""
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor:
        return rope.attention_factor
    if rope.kind == "longrope":
        longer = math.log(rope.factor) / math.log(rope.original_max_position_embeddings)
        return 1.0 if rope.factor <= 1 else math.sqrt(1 + longer)
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _frequencies(rope: Rope, dim: int) -> Tensor:
    """[dim / 2] fp32."""
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.short_factor) * wavelengths)
    if rope.kind == "yarn":
        return _yarn_frequencies(wavelengths, rope)
    return 1.0 / wavelengths / (rope.factor if rope.kind == "linear" else 1.0)


def _yarn_frequencies(wavelengths: Tensor, rope: Rope) -> Tensor:
    """Between extrapolation (fast dimensions) and interpolation (slow ones), along a linear ramp."""
    dim = 2 * wavelengths.shape[0]

    def dimension_turning(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low = dimension_turning(rope.beta_fast)
    high = dimension_turning(rope.beta_slow)
    if rope.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - extrapolated) + 1.0 / wavelengths * extrapolated
