"""What a step of the engine is given and gives back. Values and protocols only; nothing here reaches torch.

A step is one forward pass over rows of several requests. A row is one token to compute. The step loops of both kinds
of worker, the engine behind them and a simulator that stands in for it share these types.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from isthmus.errors import NonFiniteLogits
from isthmus.types import Request, SamplingParams, Token

# Positions computed or walked together, at absolute multiples of it; `kernels.shapes.TILE` is the same number.
TILE: Final = 64

# Called with the name of a plane and a layer once the step's rows of that place are stored, or their storing is
# launched. What it raises ends the step.
OnStored = Callable[[str, int], None]

StepResult = Token | NonFiniteLogits


def ignore_stored(_plane: str, _layer: int) -> None:
    """The `OnStored` of a caller that waits for no rows."""


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest steps that will run, and that memory is kept for."""

    decode_rows: int = 128
    prefill_tokens: int = 4 * TILE


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens of one prompt at positions [start, end); every position before `start` is in the cache."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    needs_logits: bool  # of the chunk's last token: the chunk ends its prompt

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One known token of one sequence. It sees every position up to its own, also those that rows of its step store."""

    token_id: int
    position: int
    block_table: Sequence[int]


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


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """`token_ids`: all tokens emitted so far, before a resume too; the new token's index is their number."""

    request: Request
    token_ids: Sequence[int]


class PendingStep(Protocol):
    """A submitted step. Until its results were taken, or raised, it reads and writes the blocks of its rows."""

    def results(self) -> list[StepResult]:
        """One per row, in their order; waits for the device with the GIL released. Called once."""
        ...


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that waits for nothing: it has its results, or has failed."""

    outcome: list[StepResult] | Exception

    def results(self) -> list[StepResult]:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Decoder(Protocol):
    """Used by the step loop's thread. Steps run in the order in which they are submitted; at most two are pending."""

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be submitted while one is pending, and its rows may have tokens of that one."""
        ...

    def submit(
        self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput], on_stored: OnStored = ignore_stored
    ) -> PendingStep:
        """Launches a step of at least one row. When it raises, nothing of it is running any more.

        The sampled token's index is `row.position + 1 - len(request.prompt_token_ids)`. `sampling.token_ids` are the
        tokens before it, without those that a pending step computes; it is read before `submit` returns, and so is
        `row.block_table`. `on_stored` is called for every plane and layer computed, or launched.
        """
        ...


def has_penalty(sampling: SamplingParams) -> bool:
    """Whether tokens that were seen change what is sampled."""
    return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1.0, 0.0, 0.0)


def needs_its_tokens(sampling: SamplingParams) -> bool:
    """Whether the host has to know a token before the next is sampled: no step may be launched ahead of it.

    Penalties count the tokens; lists of top logprobs are made by the host.
    """
    return has_penalty(sampling) or bool(sampling.logprobs)


def tokens_that_end(request: Request) -> set[int]:
    """What `min_tokens` forbids until it is reached: the request's stop tokens, and its EOS tokens unless ignored."""
    sampling = request.sampling
    return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)}
