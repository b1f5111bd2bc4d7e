"""Random weights that keep activations of every block near one and put logits apart, drawn at the speed of a copy."""

import math
import zlib
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import torch

from isthmus.checkpoint.model_config import ModelConfig

from .recipe import FP8_BLOCK

_LOGIT_STD: Final = 3.0
_ROUTER_GAIN: Final = 2.0
_BIAS_STD: Final = 0.1
_BLOCK_STD: Final = 0.4  # of what a block adds, at gain one
_LARGEST_E4M3: Final = 448.0
_NUM_LEVELS: Final = 1 << 16


class Spread(NamedTuple):
    mean: float
    std: float


def spread(config: ModelConfig, name: str, shape: tuple[int, ...]) -> Spread:
    if name.endswith("norm.weight"):
        return Spread(1.0, 0.1)
    if name.endswith("bias"):
        return Spread(0.0, _BIAS_STD)
    if name == "model.embed_tokens.weight":
        return Spread(0.0, _embedding_std(config))
    fan_in_std = 1 / math.sqrt(shape[-1])
    if name == "lm_head.weight":
        return Spread(0.0, _LOGIT_STD * fan_in_std)
    if name.endswith("mlp.gate.weight"):
        return Spread(0.0, _ROUTER_GAIN * fan_in_std)
    if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
        return Spread(0.0, _block_gain(config) * fan_in_std)
    return Spread(0.0, fan_in_std)


def _embedding_std(config: ModelConfig) -> float:
    if not config.tie_word_embeddings:
        return 1.0
    return _LOGIT_STD * config.logit_divisor / math.sqrt(config.hidden_size)


def _block_gain(config: ModelConfig) -> float:
    """Under tied embeddings a token's own row must not stand out of the sum, or the model repeats its last token."""
    if not config.tie_word_embeddings:
        return 1.0
    wanted = _embedding_std(config) * config.embedding_scale * math.sqrt(config.hidden_size) * 2
    return max(1.0, wanted / (_BLOCK_STD * config.residual_scale * math.sqrt(2 * config.num_layers)))


class Draw(NamedTuple):
    """One run of rows of a tensor; the values depend on nothing else."""

    seed: int
    name: str
    first_row: int

    def levels(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uniform 16-bit numbers, which `_quantiles` turns into normal ones."""
        entropy = np.random.SeedSequence([self.seed, zlib.crc32(self.name.encode()), self.first_row])
        words = np.random.SFC64(entropy).random_raw(-(-math.prod(shape) // 4))
        return words.view(np.uint16)[: math.prod(shape)].reshape(shape)


def stored_values(draw: Draw, shape: tuple[int, ...], spread: Spread, dtype: torch.dtype) -> bytes:
    return _table(spread, dtype)[draw.levels(shape)].tobytes()


def fp8_values(draw: Draw, shape: tuple[int, int], spread: Spread, *, powers_of_two: bool) -> tuple[bytes, np.ndarray]:
    """E4M3 bytes and the scale of each block: value = stored * scale."""
    values = torch.from_numpy(_table(spread, torch.float32)[draw.levels(shape)])
    rows, columns = shape
    padded = torch.nn.functional.pad(values, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / _LARGEST_E4M3
    if powers_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    stored = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    return stored.contiguous().view(torch.uint8).numpy().tobytes(), scales.numpy()


@cache
def _table(spread: Spread, dtype: torch.dtype) -> np.ndarray:
    values = torch.from_numpy(_quantiles() * spread.std + spread.mean).to(dtype)
    return values.view(torch.uint16).numpy() if dtype == torch.bfloat16 else values.numpy()


@cache
def _quantiles() -> np.ndarray:
    """Normal values at equal steps of probability: as good as drawn ones, and a table of them fits the cache."""
    steps = (torch.arange(_NUM_LEVELS, dtype=torch.float64) + 0.5) / _NUM_LEVELS
    return torch.special.ndtri(steps).numpy()
