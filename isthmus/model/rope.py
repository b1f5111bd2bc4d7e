"""Rotary tables with YaRN (transformers' `_compute_yarn_parameters`), and the attention scale that goes with them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.model_config import ModelConfig, Yarn


class RopeTable(NamedTuple):
    """One row per position; layouts as `kernels.ref.rotate` takes them."""

    cos: Tensor  # [context_length, R] fp32
    signed_sin: Tensor  # [context_length, R] fp32


def rope_table(config: ModelConfig) -> RopeTable:
    dim, yarn = config.qk_rope_head_dim, config.rope.yarn
    position_frequencies = config.rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    inverse = 1.0 / position_frequencies
    magnitude = 1.0
    if yarn is not None:
        inverse = _yarn_frequencies(position_frequencies, yarn, theta=config.rope.theta)
        magnitude = _magnitude(yarn)
    angles = torch.arange(config.context_length, dtype=torch.float32)[:, None] * inverse
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return RopeTable(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def attention_scale(config: ModelConfig) -> float:
    """1 / sqrt(query elements), times YaRN's mscale_all_dim correction squared."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope.yarn
    if yarn is not None and yarn.mscale_all_dim is not None:
        scale *= _mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _magnitude(yarn: Yarn) -> float:
    """What cos and sin are multiplied by."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale is not None and yarn.mscale_all_dim is not None:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def _yarn_frequencies(position_frequencies: Tensor, yarn: Yarn, *, theta: float) -> Tensor:
    """Between extrapolation (fast dimensions) and interpolation (slow ones), along a linear ramp."""
    dim = 2 * position_frequencies.shape[0]

    def dimension_turning(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension_turning(yarn.beta_fast), dimension_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (yarn.factor * position_frequencies) * (1 - extrapolated) + 1.0 / position_frequencies * extrapolated
