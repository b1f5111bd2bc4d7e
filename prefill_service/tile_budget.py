"""How many tokens a step computes: as many as keep a layer short, for cancellation is looked at between layers."""

import statistics
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise

from isthmus.engine.engine import Engine
from isthmus.steps import TILE, PrefillChunk, StepLimits

MAX_LAYER_MS = 100.0
MAX_TILES = 4
GPU_TOKENS = 8192  # a layer of so many takes milliseconds; fewer leave the products short of rows
_CANARY_ROWS = 32
_MEASURE_MS = 150.0  # layers are timed for this long, two at least
_MAX_POSITION = 4096  # what a row costs grows with its position: at later ones a layer may take longer


class _TimedEnough(Exception):
    """The rest of the pass is of no use."""


def step_limits(device: str, tile_budget: int | None) -> StepLimits:
    """What a prefill worker's engine keeps memory for."""
    prefill_tokens = tile_budget or (GPU_TOKENS if device == "cuda" else MAX_TILES * TILE)
    return StepLimits(_CANARY_ROWS, prefill_tokens)


def measure_tile_budget(engine: Engine, now: Callable[[], float]) -> int:
    """Tokens of a step: as many tiles as a layer takes MAX_LAYER_MS for, one at least. On a GPU: GPU_TOKENS.

    `now` tells seconds. Before the engine serves: it computes in free blocks of the pool and leaves no content behind.
    """
    if engine.device.type == "cuda":  # layers are launched there, not awaited: their times say nothing
        return engine.limits.prefill_tokens
    num_tiles = MAX_TILES if _layer_ms(engine, TILE, now) <= MAX_LAYER_MS else 1
    while num_tiles > 1 and (layer_ms := _layer_ms(engine, num_tiles * TILE, now)) > MAX_LAYER_MS:
        num_tiles = max(1, min(num_tiles - 1, int(num_tiles * MAX_LAYER_MS / layer_ms)))
    return num_tiles * TILE


def _layer_ms(engine: Engine, num_tokens: int, now: Callable[[], float]) -> float:
    end = min(engine.context_length, _MAX_POSITION)
    start = max(0, end - num_tokens)
    token_ids = [7919 * position % engine.vocab_size for position in range(start, end)]
    layer_ends: list[float] = []

    def on_stored(_plane: str, layer: int) -> None:
        layer_ends.append(1000 * now())
        if layer >= 2 and layer_ends[-1] - layer_ends[0] > _MEASURE_MS:
            raise _TimedEnough

    blocks = engine.pool.allocate(engine.layout.num_blocks(end))
    try:
        with suppress(_TimedEnough):
            engine.runner.prefill([PrefillChunk(token_ids, start, blocks, needs_logits=False)], on_stored)
            layer_ends.append(1000 * now())
    finally:
        engine.pool.release(blocks)
    return statistics.median(after - before for before, after in pairwise(layer_ends))
