"""Decode steps whose tokens stay on the device: the next step is launched before the host has seen them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.engine.device_sampler import DeviceSampler, PendingTokens
from isthmus.engine.runner import check_rows
from isthmus.engine.triton_runner import TritonRunner
from isthmus.kv.planes import LATENT
from isthmus.steps import (
    DecodeRow,
    FromPrevious,
    OnStored,
    PendingStep,
    SamplingInput,
    StepResult,
    StepRow,
    ignore_stored,
)


class TritonDecoder:
    """What `isthmus.steps.Decoder` promises. Used by one thread, on one stream.

    A step's inputs are staged while the step before runs; all that the host ever waits for is the copy of its tokens.
    Raises UnsupportedKernel, or ValueError for a vocabulary that the sampler does not take.
    """

    runs_ahead = True

    def __init__(self, runner: TritonRunner) -> None:
        config = runner.model.config
        device = runner.model.device
        self._runner = runner
        self._num_layers = config.num_layers
        self._device = device
        self._sampler = DeviceSampler(config.vocab_size, runner.buffers.buckets[-1], device)
        if device.type == "cuda":  # compiles it
            self._sampler.launch(torch.zeros(runner.buffers.buckets[0], config.vocab_size, device=device))

    def submit(
        self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput], on_stored: OnStored = ignore_stored
    ) -> PendingStep:
        """As `Decoder` says."""
        try:
            pending = self._launch(rows, sampling)
        except Exception:
            if self._device.type == "cuda":  # a part of it may run
                torch.cuda.current_stream(self._device).synchronize()
            raise
        for layer in range(self._num_layers):
            on_stored(LATENT, layer)
        return pending

    @torch.inference_mode()
    def _launch(self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput]) -> PendingStep:
        indices = [
            row.position + 1 - len(sequence.request.prompt_token_ids)
            for row, sequence in zip(rows, sampling, strict=True)
        ]
        known = [_known(row) for row in rows]
        check_rows(known, self._runner.model.config, self._runner.cache.layout)
        sources = [row.token.index if isinstance(row.token, FromPrevious) else -1 for row in rows]
        pending: list[PendingTokens] = []
        tokens: list[Tensor] = []
        for part in self._runner.parts(len(rows)):
            self._sampler.stage(sampling[part], indices[part])
            logits = self._runner.launch(known[part], sources[part])
            sampled = self._sampler.launch(logits)
            tokens.append(sampled.tokens[: part.stop - part.start])
            pending.append(self._sampler.collect(sampled, logits))
        # Not before every part has read those of the step before.
        torch.cat(tokens, out=self._runner.buffers.sampled[: len(rows)])
        return _PendingParts(pending)


class _PendingParts(NamedTuple):
    parts: list[PendingTokens]

    def results(self) -> list[StepResult]:
        """As `PendingStep` says."""
        return [result for part in self.parts for result in part.results()]


def _known(row: StepRow) -> DecodeRow:
    """With token 0 in place of one that only the device knows."""
    token_id = row.token if isinstance(row.token, int) else 0
    return DecodeRow(token_id, row.position, row.block_table)
