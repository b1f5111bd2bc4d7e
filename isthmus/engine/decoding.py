"""What the step loop drives: a step is submitted, and its tokens are taken when the next one may already be under way.

Where sampled tokens stay on the device, step n + 1 is launched before the results of step n are taken: its rows name
samples of step n in place of tokens. A row of a sequence that step n ended is then computed in vain.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from isthmus.engine.runner import DecodeRow, OnLayer, StepRunner
from isthmus.engine.sampler import SamplingInput, has_penalty, sample
from isthmus.errors import NonFiniteLogits
from isthmus.types import SamplingParams, Token

StepResult = Token | NonFiniteLogits


@dataclass(frozen=True, slots=True)
class FromPrevious:
    """What row `index` of the step submitted before this one samples. If its logits are not finite: any valid id."""

    index: int


@dataclass(frozen=True, slots=True)
class StepRow:
    """Computes `token` at `position` and samples the next one; its own latent is stored at that position."""

    token: int | FromPrevious
    position: int
    block_table: Sequence[int]


class PendingStep(Protocol):
    """A submitted step. Until its results were taken, or raised, it reads and writes the blocks of its rows."""

    def results(self) -> list[StepResult]:
        """One per row, in their order; waits for the device with the GIL released. Called once."""
        ...


class Decoder(Protocol):
    """Used by the step loop's thread. Steps run in the order in which they are submitted; at most two are pending."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be submitted while one is pending, and its rows may have tokens of that one."""
        ...

    def submit(
        self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput], on_layer: OnLayer = lambda _: None
    ) -> PendingStep:
        """Launches a step of at least one row. When it raises, nothing of it is running any more.

        The sampled token's index is `row.position + 1 - len(request.prompt_token_ids)`. `sampling.token_ids` are the
        tokens before it, without those that a pending step computes; it is read before `submit` returns, and so is
        `row.block_table`. `on_layer` is called for layers computed, or launched.
        """
        ...


def needs_its_tokens(sampling: SamplingParams) -> bool:
    """Whether the host has to know a token before the next is sampled: no step may be launched ahead of it.

    Penalties count the tokens; lists of top logprobs are made by the host.
    """
    return has_penalty(sampling) or bool(sampling.logprobs)


@dataclass(frozen=True, slots=True)
class HostDecoder:
    """Computes a step when it is submitted and samples on the host."""

    runner: StepRunner
    runs_ahead = False

    def submit(
        self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput], on_layer: OnLayer = lambda _: None
    ) -> PendingStep:
        logits = self.runner.decode([_known(row) for row in rows], on_layer=on_layer)
        return Done(sample(logits, sampling))


@dataclass(frozen=True, slots=True)
class Done:
    """A step that is not pending: it has its results, or has failed."""

    outcome: list[StepResult] | Exception

    def results(self) -> list[StepResult]:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def _known(row: StepRow) -> DecodeRow:
    assert isinstance(row.token, int), "no step is pending"
    return DecodeRow(row.token, row.position, row.block_table)
