"""An engine for decode loops without a model: a real block pool, tokens from `hash_model`, no time spent.

A cached row is a number, the hash of its token and of the row before it. So a step that reads a block of other content,
a block that nobody filled or one that was given back fails here, where the real engine would silently go wrong.
"""

from collections.abc import Callable, Sequence

from isthmus.errors import NonFiniteLogits
from isthmus.kv.block_pool import BlockPool
from isthmus.kv.layout import KvLayout
from isthmus.kv.prefix import prefix_hashes, prefix_scope
from isthmus.steps import FromPrevious, OnStored, SamplingInput, StepResult, StepRow, ignore_stored
from isthmus.testing.block_pool_check import check_referenced
from isthmus.testing.hash_model import FAKE_LAYOUT, NO_ROW, VOCAB_SIZE, next_token, row_after
from isthmus.types import Token


class FakeDecodeEngine:
    """A `DecodeEngine`, owned by the loop that drives it. `rows` is its cache, by slot: block * block_size + offset.

    `runs_ahead`: a step is computed when its results are taken, later than any device would. `on_step` is called as a
    step is submitted, with its number from 1 on: a test lets time pass there, or raises.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        layout: KvLayout = FAKE_LAYOUT,
        context_length: int = 4096,
        runs_ahead: bool = False,
        on_step: Callable[[int], None] = lambda _: None,
    ):
        self.layout = layout
        self.pool = BlockPool(num_blocks, layout.block_size)
        self.context_length = context_length
        self.vocab_size = VOCAB_SIZE
        self.numerics_digest = "cd" * 16
        self.rows: dict[int, int] = {}
        self.decoder = FakeDecoder(self, runs_ahead=runs_ahead, on_step=on_step)

    def match_prompt(self, token_ids: Sequence[int], tenant: str) -> list[int]:
        return self.pool.match(self._hashes(token_ids, tenant))

    def publish_prompt(self, token_ids: Sequence[int], block_table: Sequence[int], tenant: str) -> None:
        for block, block_hash in zip(block_table, self._hashes(token_ids, tenant), strict=False):
            self.pool.publish(block, block_hash)

    def check_device(self) -> None:
        """Never lost."""

    def slot(self, block_table: Sequence[int], position: int) -> int:
        block, offset = divmod(position, self.layout.block_size)
        return block_table[block] * self.layout.block_size + offset

    def fill(self, block_table: Sequence[int], token_ids: Sequence[int]) -> None:
        """Stores the rows of these tokens from position 0 on, as a transfer that brings them."""
        row = NO_ROW
        for position, token_id in enumerate(token_ids):
            row = row_after(row, token_id)
            self.rows[self.slot(block_table, position)] = row

    def _hashes(self, token_ids: Sequence[int], tenant: str) -> list[bytes]:
        return prefix_hashes(token_ids, self.layout.block_size, prefix_scope(self.layout.fingerprint, tenant=tenant))


class FakeDecoder:
    """Steps are numbered from 1 on; `non_finite` holds tokens, as (request id, index), that cannot be sampled."""

    def __init__(self, engine: FakeDecodeEngine, *, runs_ahead: bool, on_step: Callable[[int], None]):
        self.runs_ahead = runs_ahead
        self.num_steps = 0
        self.num_rows: list[int] = []  # of each step
        self.non_finite: set[tuple[str, int]] = set()
        self._engine = engine
        self._on_step = on_step
        self._pending: list[FakeStep] = []
        self._row_of: dict[tuple[int, ...], int] = {(): NO_ROW}  # expected, by the tokens up to it

    def submit(
        self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput], on_stored: OnStored = ignore_stored
    ) -> "FakeStep":
        """As `Decoder` says."""
        assert len(self._pending) <= (1 if self.runs_ahead else 0), "a step before this one still waits"
        self.num_steps += 1
        self.num_rows.append(len(rows))
        self._on_step(self.num_steps)
        step = FakeStep(self, rows, sampling, self._pending[-1] if self._pending else None)
        self._pending.append(step)
        for plane in self._engine.layout.planes:
            for layer in range(plane.num_layers):
                on_stored(plane.name, layer)
        if not self.runs_ahead:
            step.compute()
        return step

    def take(self, step: "FakeStep") -> None:
        """Its results are being taken: the oldest first."""
        assert self._pending.pop(0) is step, "results are taken in the order of the steps"

    def check_blocks(self, rows: Sequence[StepRow]) -> None:
        """What the rows read and write is held by somebody."""
        size = self._engine.layout.block_size
        for row in rows:
            check_referenced(self._engine.pool, row.block_table[: row.position // size + 1])

    def compute_row(self, block_table: Sequence[int], known: Sequence[int]) -> None:
        """Stores the row of the last of `known`, prompt and tokens; what lies before it must be theirs."""
        engine = self._engine
        before = engine.rows[engine.slot(block_table, len(known) - 2)] if len(known) > 1 else NO_ROW
        assert before == self._expected_row(tuple(known[:-1])), "a cached row is not of this stream"
        engine.rows[engine.slot(block_table, len(known) - 1)] = row_after(before, known[-1])

    def _expected_row(self, known: tuple[int, ...]) -> int:
        row = self._row_of.get(known)
        if row is None:
            row = NO_ROW
            for token_id in known:
                row = row_after(row, token_id)
            self._row_of[known] = row
        return row


class FakeStep:
    """A submitted step. Owner: its decoder."""

    def __init__(
        self,
        decoder: FakeDecoder,
        rows: Sequence[StepRow],
        sampling: Sequence[SamplingInput],
        before: "FakeStep | None",
    ):
        self._decoder = decoder
        self._rows = [StepRow(row.token, row.position, list(row.block_table)) for row in rows]
        self._sampling = [SamplingInput(wanted.request, tuple(wanted.token_ids)) for wanted in sampling]
        self._before = before
        self._results: list[StepResult] | None = None

    def results(self) -> list[StepResult]:
        self._decoder.take(self)
        self.compute()
        assert self._results is not None
        return self._results

    def compute(self) -> None:
        if self._results is None:
            self._decoder.check_blocks(self._rows)
            self._results = [self._sample(row, wanted) for row, wanted in zip(self._rows, self._sampling, strict=True)]

    def sampled(self, index: int) -> int:
        """The id that row `index` sampled; any id for one whose logits were not finite."""
        self.compute()
        assert self._results is not None
        result = self._results[index]
        return result.id if isinstance(result, Token) else 0

    def _sample(self, row: StepRow, wanted: SamplingInput) -> StepResult:
        request = wanted.request
        index = row.position + 1 - len(request.prompt_token_ids)
        tokens = self._tokens_before(row, wanted, index)
        self._decoder.compute_row(row.block_table, (*request.prompt_token_ids, *tokens))
        if (request.request_id, index) in self._decoder.non_finite:
            return NonFiniteLogits(f"token {index}: the model's logits are not finite")
        return Token(next_token(request, tokens))

    def _tokens_before(self, row: StepRow, wanted: SamplingInput, index: int) -> tuple[int, ...]:
        """All tokens up to the row's own; those that a pending step replays are known from the request."""
        known = tuple(wanted.token_ids)
        if isinstance(row.token, FromPrevious):
            assert self._before is not None, "no step was under way"
            replayed = wanted.request.emitted_token_ids[len(known) : index - 1]
            known = (*known, *replayed, self._before.sampled(row.token.index))
        else:
            assert known[-1] == row.token, "the row's token is the last one known"
        assert len(known) == index, "positions and tokens belong together"
        return known
