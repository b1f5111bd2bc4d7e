"""How many tokens a step computes: as many as keep a layer short, for cancellation is looked at between layers."""

import statistics
import time
from contextlib import suppress
from itertools import pairwise

from isthmus.engine.engine import Engine
from isthmus.engine.runner import TILE, PrefillChunk

MAX_LAYER_MS = 100.0
MAX_TILES = 4
_MEASURE_MS = 150.0  # layers are timed for this long, two at least
_MAX_POSITION = 4096  # what a row costs grows with its position: at later ones a layer may take longer


class _TimedEnough(Exception):
    """The rest of the pass is of no use."""


def measure_tile_budget(engine: Engine) -> int:
    """Tokens of a step: as many tiles as a layer takes MAX_LAYER_MS for, one at least.

    Before the engine serves: it computes in free blocks of the pool and leaves no content behind.
    """
    num_tiles = MAX_TILES if _layer_ms(engine, TILE) <= MAX_LAYER_MS else 1
    while num_tiles > 1 and (layer_ms := _layer_ms(engine, num_tiles * TILE)) > MAX_LAYER_MS:
        num_tiles = max(1, min(num_tiles - 1, int(num_tiles * MAX_LAYER_MS / layer_ms)))
    return num_tiles * TILE


def _layer_ms(engine: Engine, num_tokens: int) -> float:
    end = min(engine.context_length, _MAX_POSITION)
    start = max(0, end - num_tokens)
    token_ids = [7919 * position % engine.model_config.vocab_size for position in range(start, end)]
    layer_ends: list[float] = []

    def on_layer(layer: int) -> None:
        layer_ends.append(1000 * time.monotonic())
        if layer >= 2 and layer_ends[-1] - layer_ends[0] > _MEASURE_MS:
            raise _TimedEnough

    blocks = engine.pool.allocate(engine.layout.num_blocks(end))
    try:
        with suppress(_TimedEnough):
            engine.runner.prefill([PrefillChunk(token_ids, start, blocks, needs_logits=False)], on_layer)
            layer_ends.append(1000 * time.monotonic())
    finally:
        engine.pool.release(blocks)
    return statistics.median(after - before for before, after in pairwise(layer_ends))
