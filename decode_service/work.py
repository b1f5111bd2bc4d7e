"""What one step computes for one stream, as a value.

The step loop asks each stream's work for its rows, and gives it the results of those rows. It does not know what kinds
of work there are, nor how many tokens a row gives. A new kind, such as the verification of drafted tokens, is a class
here and a line in `next_work`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from decode_service.stream_run import Settled, StreamRun
from isthmus.steps import FromPrevious, SamplingInput, StepResult, StepRow
from isthmus.text.finish import is_full


class Ahead(NamedTuple):
    """What a step that is under way adds to a stream: this many tokens, the last of them sampled by row `last`."""

    num_tokens: int
    last: FromPrevious


class Work(Protocol):
    """Read-only. `rows` and `settle` are called once each, by the step loop, in this order."""

    @property
    def run(self) -> StreamRun: ...

    @property
    def num_rows(self) -> int:
        """At least 1."""
        ...

    @property
    def num_positions(self) -> int:
        """Positions of the stream that are stored once the step has run; its block table has to reach that far."""
        ...

    @property
    def may_be_followed(self) -> bool:
        """Whether another step of the stream may be launched before the results of this one are taken."""
        ...

    def rows(self) -> Sequence[tuple[StepRow, SamplingInput]]:
        """`num_rows` rows, each with what its sample is drawn by."""
        ...

    def settle(self, results: Sequence[StepResult]) -> Settled:
        """Gives the run the results of its rows, in their order."""
        ...

    def ahead(self, first_row: int) -> Ahead:
        """What the stream has more once the step has run. `first_row`: the index of its first row in the step."""
        ...


@dataclass(frozen=True, slots=True)
class Continue:
    """Computes the newest token, and so samples the one after it."""

    run: StreamRun
    token: int | FromPrevious
    num_tokens: int  # up to and with `token`
    num_rows: int = field(default=1, init=False)

    @property
    def num_positions(self) -> int:
        return self.run.num_prompt_tokens + self.num_tokens

    @property
    def may_be_followed(self) -> bool:
        return not self.run.needs_its_tokens

    def rows(self) -> Sequence[tuple[StepRow, SamplingInput]]:
        run = self.run
        row = StepRow(self.token, run.num_prompt_tokens + self.num_tokens - 1, run.block_table)
        return ((row, SamplingInput(run.request, run.token_ids)),)

    def settle(self, results: Sequence[StepResult]) -> Settled:
        return self.run.accept_all(results)

    def ahead(self, first_row: int) -> Ahead:
        return Ahead(1, FromPrevious(first_row))


@dataclass(frozen=True, slots=True)
class Replay:
    """Computes emitted tokens again, many in one step; each sample is compared with the emitted token after it."""

    run: StreamRun
    first: int  # how many tokens are known with the first row's token
    num_rows: int

    @property
    def num_positions(self) -> int:
        return self.run.num_prompt_tokens + self.first + self.num_rows - 1

    @property
    def may_be_followed(self) -> bool:
        return not self.run.needs_its_tokens

    def rows(self) -> Sequence[tuple[StepRow, SamplingInput]]:
        run = self.run
        emitted = run.request.emitted_token_ids
        rows: list[tuple[StepRow, SamplingInput]] = []
        for num_tokens in range(self.first, self.first + self.num_rows):
            row = StepRow(emitted[num_tokens - 1], run.num_prompt_tokens + num_tokens - 1, run.block_table)
            rows.append((row, SamplingInput(run.request, emitted[:num_tokens])))
        return rows

    def settle(self, results: Sequence[StepResult]) -> Settled:
        return self.run.accept_all(results)

    def ahead(self, first_row: int) -> Ahead:
        return Ahead(self.num_rows, FromPrevious(first_row + self.num_rows - 1))


def next_work(run: StreamRun, max_extra_rows: int, ahead: Ahead | None) -> Work | None:
    """What the next step computes for a stream, behind the step that is under way (`ahead`), if one is.

    At most `max_extra_rows` rows beyond the first. None: the tokens under way are certain to end the stream.
    """
    num_tokens = len(run.token_ids)
    if ahead is not None:
        num_tokens += ahead.num_tokens
    if is_full(run.request, num_tokens, run.context_length):
        return None
    num_emitted = len(run.request.emitted_token_ids)
    if num_tokens > num_emitted:
        newest = run.token_ids[-1] if ahead is None else ahead.last
        return Continue(run, newest, num_tokens)
    last = min(num_emitted, num_tokens + max_extra_rows)
    return Replay(run, num_tokens, last - num_tokens + 1)
