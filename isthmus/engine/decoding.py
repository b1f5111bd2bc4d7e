"""The decoder that computes at once: a step is run when it is submitted, and its tokens are sampled on the host.

`isthmus.steps.Decoder` says what a decoder promises. `isthmus.engine.triton_decoder` has the one that runs ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.engine.runner import StepRunner
from isthmus.engine.sampler import sample
from isthmus.steps import DecodeRow, FinishedStep, OnStored, PendingStep, SamplingInput, StepRow, ignore_stored


@dataclass(frozen=True, slots=True)
class HostDecoder:
    """Computes a step when it is submitted and samples on the host."""

    runner: StepRunner
    runs_ahead = False

    def submit(
        self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput], on_stored: OnStored = ignore_stored
    ) -> PendingStep:
        """As `Decoder` says; the step has its results when this returns."""
        logits = self.runner.decode([_known(row) for row in rows], on_stored)
        return FinishedStep(sample(logits, sampling))


def _known(row: StepRow) -> DecodeRow:
    assert isinstance(row.token, int), "no step is pending"
    return DecodeRow(row.token, row.position, row.block_table)
