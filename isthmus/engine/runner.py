"""Runs steps of the model on a cache. Nothing is kept between steps: a step sees its rows and the cache.

Called from one thread at a time, the one that owns the cache's blocks.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from isthmus.checkpoint.model_config import ModelConfig
from isthmus.engine.latent_cache import LatentCache
from isthmus.kv.layout import KvLayout
from isthmus.kv.planes import LATENT
from isthmus.model import Model
from isthmus.model.step import decode_step, prefill_step
from isthmus.steps import DecodeRow, OnStored, PrefillChunk, ignore_stored


class StepRunner(Protocol):
    """What runs steps: `TorchRunner` in plain torch, `isthmus.engine.triton_runner.TritonRunner` with the kernels."""

    @property
    def model(self) -> Model: ...

    @property
    def cache(self) -> LatentCache: ...

    @property
    def kernels(self) -> str:
        """An ingredient of the numerics class: what computes."""
        ...

    def prefill(self, chunks: Sequence[PrefillChunk], on_stored: OnStored = ...) -> Tensor:
        """Logits [chunks with needs_logits, vocab] in fp32, in their order. A sequence has at most one chunk a step.

        `on_stored(plane, layer)` follows the storing of that place's rows. It may raise to abort; the step's rows are
        then void.
        """
        ...

    def decode(self, rows: Sequence[DecodeRow], on_stored: OnStored = ...) -> Tensor:
        """Logits [rows, vocab] in fp32. Several rows of one sequence (replay) see one another up to their position."""
        ...


class TorchRunner:
    """Runs steps in plain torch. What `StepRunner` promises holds."""

    kernels = "torch"

    def __init__(self, model: Model, cache: LatentCache) -> None:
        self.model = model
        self.cache = cache

    def prefill(self, chunks: Sequence[PrefillChunk], on_stored: OnStored = ignore_stored) -> Tensor:
        """As `StepRunner` says."""
        check_chunks(chunks, self.model.config, self.cache.layout)
        with torch.inference_mode():
            step = prefill_step(chunks, self.cache.shape, self.model.device)
            return self.model.prefill(step, self.cache.rows[LATENT], on_stored)

    def decode(self, rows: Sequence[DecodeRow], on_stored: OnStored = ignore_stored) -> Tensor:
        """As `StepRunner` says."""
        check_rows(rows, self.model.config, self.cache.layout)
        with torch.inference_mode():
            step = decode_step(rows, self.cache.shape, self.model.device)
            return self.model.decode(step, self.cache.rows[LATENT], on_stored)


def check_chunks(chunks: Sequence[PrefillChunk], config: ModelConfig, layout: KvLayout) -> None:
    """Raises ValueError for a chunk with a wrong token id, position or block table.

    One such chunk would end the step for every other sequence in it, or read another sequence's blocks.
    """
    _check_any(chunks)
    for chunk in chunks:
        _check(config, layout, chunk.token_ids, chunk.start, chunk.block_table)


def check_rows(rows: Sequence[DecodeRow], config: ModelConfig, layout: KvLayout) -> None:
    """What `check_chunks` does, for the rows of a decode step."""
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
