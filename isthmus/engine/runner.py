"""Runs steps of the model on a cache. Stateless between steps: what a step sees is its rows and the cache.

Called from one thread at a time, the one that owns the cache's blocks.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isthmus.engine.latent_cache import LatentCache
from isthmus.model import Model
from isthmus.model.step import DecodeRow, PrefillChunk, decode_step, prefill_step
from kernels.ref import TILE

__all__ = ["TILE", "DecodeRow", "PrefillChunk", "Runner"]

LATENT_PLANE = 0


class Runner:
    def __init__(self, model: Model, cache: LatentCache) -> None:
        self.model = model
        self.cache = cache

    def prefill(self, chunks: Sequence[PrefillChunk], on_layer: Callable[[int], None] = lambda _: None) -> Tensor:
        """Logits [chunks with needs_logits, vocab] in fp32, in their order. A sequence has at most one chunk a step.

        `on_layer(l)` follows the storing of layer l's latents; it may raise to abort, the step's rows are then void.
        """
        for chunk in chunks:
            self._check(chunk.token_ids, first=chunk.start, block_table=chunk.block_table)
        return self._forward(prefill_step, chunks, on_layer)

    def decode(self, rows: Sequence[DecodeRow], on_layer: Callable[[int], None] = lambda _: None) -> Tensor:
        """Logits [rows, vocab] in fp32. Several rows of one sequence (replay) see one another up to their position."""
        for row in rows:
            self._check((row.token_id,), first=row.position, block_table=row.block_table)
        return self._forward(decode_step, rows, on_layer)

    @torch.inference_mode()
    def _forward(self, make_step: Callable, parts: Sequence, on_layer: Callable[[int], None]) -> Tensor:
        if not parts:
            raise ValueError("a step needs at least one row")
        step = make_step(parts, self.cache.shape, self.model.device)
        return self.model.forward(step, self.cache.rows[LATENT_PLANE], on_layer)

    def _check(self, token_ids: Sequence[int], *, first: int, block_table: Sequence[int]) -> None:
        """One wrong id or table would end the step for every other sequence in it, or read another's blocks."""
        config, end = self.model.config, first + len(token_ids)
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
            raise ValueError(f"token ids must be 0 to {config.vocab_size - 1}, at least one")
        if first < 0 or end > config.context_length:
            raise ValueError(f"positions {first} to {end} leave the context of {config.context_length}")
        needed = self.cache.layout.num_blocks(end)
        if len(block_table) < needed:
            raise ValueError(f"position {end - 1} needs {needed} blocks, the table has {len(block_table)}")
