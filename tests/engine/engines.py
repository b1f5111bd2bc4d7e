"""Engines for tests, one per setting, and the small moves tests make with them."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint
from isthmus.engine.engine import Engine
from isthmus.kv.planes import LATENT
from isthmus.steps import DecodeRow, PrefillChunk

NUM_POSITIONS = 4096


@cache
def bundled_engine(dtype: str = "fp32", block_size: int = 16) -> Engine:
    checkpoint = Checkpoint.open("bundled")
    return Engine.open(checkpoint, dtype=dtype, block_size=block_size, num_blocks=NUM_POSITIONS // block_size)


def poison(engine: Engine) -> None:
    """NaN in every block: whatever a step reads without having written it shows in its logits."""
    for layer in engine.cache.layers[LATENT]:
        layer.fill_(torch.nan)


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(97 * i + 389 * seed + i * i) % 2048 for i in range(length)]


def scattered_table(engine: Engine, num_positions: int, seed: int) -> list[int]:
    """Blocks in random order, none twice."""
    order = torch.randperm(engine.cache.shape.num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: engine.layout.num_blocks(num_positions)]


def prefill(engine: Engine, token_ids: Sequence[int], table: Sequence[int], *, cuts: Sequence[int] = ()) -> Tensor:
    """Logits [vocab] of the last token, computed in chunks that end at `cuts`."""
    bounds = [0, *cuts, len(token_ids)]
    for start, end in pairwise(bounds):
        chunk = PrefillChunk(token_ids[start:end], start, table, needs_logits=end == len(token_ids))
        logits = engine.runner.prefill([chunk])
    return logits[0]


def decode_each(engine: Engine, token_ids: Sequence[int], start: int, table: Sequence[int]) -> Tensor:
    """Logits [tokens, vocab], one step a token."""
    rows = [DecodeRow(token, start + i, table) for i, token in enumerate(token_ids)]
    return torch.cat([engine.runner.decode([row]) for row in rows])


def latents(engine: Engine, table: Sequence[int], count: int) -> Tensor:
    """[layers, count, row elements] as stored."""
    return torch.stack([layer[list(table)].flatten(0, 1)[:count] for layer in engine.cache.layers[LATENT]])
