"""Runs steps of the model on a cache. Stateless between steps: what a step sees is its rows and the cache.

Called from one thread at a time, the one that owns the cache's blocks.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from isthmus.checkpoint.model_config import ModelConfig
from isthmus.engine.latent_cache import LatentCache
from isthmus.kv.layout import KvLayout
from isthmus.model import Model
from isthmus.model.step import DecodeRow, PrefillChunk, decode_step, prefill_step
from kernels.ref import TILE

__all__ = ["TILE", "DecodeRow", "PrefillChunk", "Runner", "StepRunner"]

LATENT_PLANE = "latent"
OnLayer = Callable[[int], None]


class StepRunner(Protocol):
    """What runs steps: `Runner` in plain torch, `isthmus.engine.triton_runner.TritonRunner` with the kernels."""

    @property
    def model(self) -> Model: ...

    @property
    def cache(self) -> LatentCache: ...

    @property
    def kernels(self) -> str:
        """An ingredient of the numerics class: what computes."""
        ...

    def prefill(self, chunks: Sequence[PrefillChunk], on_layer: OnLayer = ...) -> Tensor:
        """Logits [chunks with needs_logits, vocab] in fp32, in their order. A sequence has at most one chunk a step.

        `on_layer(l)` follows the storing of layer l's latents; it may raise to abort, the step's rows are then void.
        """
        ...

    def decode(self, rows: Sequence[DecodeRow], on_layer: OnLayer = ...) -> Tensor:
        """Logits [rows, vocab] in fp32. Several rows of one sequence (replay) see one another up to their position."""
        ...


class Runner:
    kernels = "torch"

    def __init__(self, model: Model, cache: LatentCache) -> None:
        self.model = model
        self.cache = cache

    def prefill(self, chunks: Sequence[PrefillChunk], on_layer: OnLayer = lambda _: None) -> Tensor:
        """As `StepRunner` says."""
        check_chunks(chunks, self.model.config, self.cache.layout)
        return self._forward(prefill_step, chunks, on_layer)

    def decode(self, rows: Sequence[DecodeRow], on_layer: OnLayer = lambda _: None) -> Tensor:
        """As `StepRunner` says."""
        check_rows(rows, self.model.config, self.cache.layout)
        return self._forward(decode_step, rows, on_layer)

    @torch.inference_mode()
    def _forward(self, make_step: Callable, parts: Sequence, on_layer: OnLayer) -> Tensor:
        step = make_step(parts, self.cache.shape, self.model.device)
        return self.model.forward(step, self.cache.rows[LATENT_PLANE], on_layer)


def check_chunks(chunks: Sequence[PrefillChunk], config: ModelConfig, layout: KvLayout) -> None:
    """One wrong id or table would end the step for every other sequence in it, or read another's blocks: ValueError."""
    _check_any(chunks)
    for chunk in chunks:
        _check(config, layout, chunk.token_ids, chunk.start, chunk.block_table)


def check_rows(rows: Sequence[DecodeRow], config: ModelConfig, layout: KvLayout) -> None:
    """The same of a decode step."""
    _check_any(rows)
    for row in rows:
        _check(config, layout, (row.token_id,), row.position, row.block_table)


def _check_any(parts: Sequence[object]) -> None:
    if not parts:
        raise ValueError("a step needs at least one row")


def _check(
    config: ModelConfig, layout: KvLayout, token_ids: Sequence[int], first: int, block_table: Sequence[int]
) -> None:
    end = first + len(token_ids)
    if not token_ids or min(token_ids) < 0 or max(token_ids) >= config.vocab_size:
        raise ValueError(f"token ids must be 0 to {config.vocab_size - 1}, at least one")
    if first < 0 or end > config.context_length:
        raise ValueError(f"positions {first} to {end} leave the context of {config.context_length}")
    needed = layout.num_blocks(end)
    if len(block_table) < needed:
        raise ValueError(f"position {end - 1} needs {needed} blocks, the table has {len(block_table)}")
