"""A prefill loop core with a fake engine and a fake sender, in a time that the test moves. No thread, no socket."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger, LedgerEvent
from isthmus.process.health import ProgressWatch
from isthmus.steps import OnStored, PrefillChunk, SamplingInput, StepResult
from isthmus.testing.fake_prefill_engine import FakePrefillEngine
from isthmus.testing.manual_clock import ManualClock
from isthmus.types import Request, SamplingParams, Token, TransferTarget
from isthmus.worker.instruments import Instruments
from kv_transfer.outgoing import OnDone, TransferOutcome
from prefill_service.ports import LoopPorts
from prefill_service.prefill_loop import PrefillLoop
from prefill_service.prompt import Event, Prompt
from prefill_service.submissions import Submissions

STEP_S = 0.25
LAYER_S = 0.01
TARGET = TransferTarget("aa" * 16, 1, "inproc://decode", "bb" * 16, "cc" * 16)
Row = tuple[str, int, int, int]  # plane, layer, first token, number of tokens


@dataclass(eq=False)
class FakeTransfer:
    """What one prompt handed to its transfer, in order; the test ends it."""

    blocks: tuple[int, ...]
    on_done: OnDone
    said: list[object] = field(default_factory=list[object])

    def rows_ready(self, plane: str, layer: int, first: int, n: int) -> None:
        self.said.append((plane, layer, first, n))

    def commit(self, *tokens: Token) -> None:
        self.said.append(tokens)

    def abort(self, reason: str, *, finished: bool = False) -> None:
        self.said.append(f"{reason} (finished)" if finished else reason)

    def end(self, failure: str = "", last_ack_ns: int | None = None) -> None:
        self.on_done(TransferOutcome(len(self.blocks), not failure, failure, 100, 4, last_ack_ns))

    @property
    def rows(self) -> list[Row]:
        return [entry for entry in self.said if isinstance(entry, tuple) and len(entry) == 4]


class FakeSender:
    """Opens transfers that go nowhere; `refusal` is raised in place of opening one."""

    def __init__(self) -> None:
        self.transfers: dict[str, FakeTransfer] = {}  # by request id
        self.refusal: IsthmusError | None = None

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnDone, *, request_id: str = ""
    ) -> FakeTransfer:
        if self.refusal is not None:
            raise self.refusal
        transfer = FakeTransfer(tuple(block_table), on_done)
        self.transfers[request_id] = transfer
        return transfer


class SteppedEngine(FakePrefillEngine):
    """A step takes STEP_S and each of its layers LAYER_S more; the test may act at a layer, or choose the results."""

    def __init__(self, num_blocks: int, clock: ManualClock, **options: Any):
        super().__init__(num_blocks, on_step=self._began, **options)
        self.steps: list[list[tuple[int, int]]] = []  # (start, tokens) of each chunk
        self.at_layer: Callable[[int], None] = lambda _: None
        self.results: list[StepResult] | None = None
        self.device_lost = False
        self._clock = clock

    def check_device(self) -> None:
        if self.device_lost:
            raise RuntimeError("an illegal memory access was encountered")

    def compute(
        self, chunks: Sequence[PrefillChunk], sampling: Sequence[SamplingInput], on_stored: OnStored
    ) -> list[StepResult]:
        def stored(plane: str, layer: int) -> None:
            self._clock.advance(LAYER_S)
            self.at_layer(layer)
            on_stored(plane, layer)

        results = super().compute(chunks, sampling, stored)
        return results if self.results is None else self.results

    def _began(self, chunks: Sequence[PrefillChunk]) -> None:
        self.steps.append([(chunk.start, len(chunk.token_ids)) for chunk in chunks])
        self._clock.advance(STEP_S)


@dataclass(eq=False)
class Submitted:
    prompt: Prompt
    said: list[Event]

    @property
    def kinds(self) -> list[str | None]:
        return [
            type(event).__name__ if isinstance(event, IsthmusError) else event.WhichOneof("event")
            for event in self.said
        ]

    def last(self, kind: str) -> Any:
        """The newest event of a kind."""
        return next(
            getattr(event, kind)
            for event in reversed(self.said)
            if not isinstance(event, IsthmusError) and event.WhichOneof("event") == kind
        )


class PrefillWorld:
    """One loop and all around it. `turn` moves time to the moment the loop asked for."""

    def __init__(self, num_blocks: int = 64, *, tile_budget: int = 256, failpoints: str = "", **engine: Any):
        self.clock = ManualClock()
        self.engine = SteppedEngine(num_blocks, self.clock, **engine)
        self.sender = FakeSender()
        self.ledger = Ledger(self.clock)
        self.progress = ProgressWatch(self.clock)
        instruments = Instruments(self.ledger, Failpoints.parse(failpoints), self.progress)
        ports = LoopPorts(self.engine, self.sender, self.clock.now, instruments)
        self.loop = PrefillLoop(ports, tile_budget)
        self.submissions = Submissions(self.engine, self.loop, self.loop.take)

    def submit(
        self, num_tokens: int, *, first: int = 1, sends: bool = True, timeout_s: float | None = None, **fields: Any
    ) -> Submitted:
        """A prompt of the tokens from `first` on; its request id says which they are."""
        sampling = fields.pop("sampling", SamplingParams(max_tokens=8 if sends else 1, ignore_eos=True))
        token_ids = tuple(range(first, first + num_tokens))
        request = Request(f"{first}+{num_tokens}", 7, token_ids, sampling, **fields)
        said: list[Event] = []
        deadline = None if timeout_s is None else self.clock.now() + timeout_s
        prompt = Prompt(request=request, target=TARGET if sends else None, emit=said.append, deadline=deadline)
        self.submissions.submit(prompt)
        return Submitted(prompt, said)

    def turn(self) -> float | None:
        """How long the loop wants to wait for its next turn; None: until a command."""
        now = self.clock.now()
        at = self.loop.turn(now)
        return None if at is None else at - now

    def run(self) -> None:
        """Turns until nothing can be computed."""
        while self.turn() == 0:
            pass

    def transfer(self, submitted: Submitted) -> FakeTransfer:
        return self.sender.transfers[submitted.prompt.request_id]

    def recorded(self, event: str) -> list[LedgerEvent]:
        return [entry for entry in self.ledger.read() if entry.event == event]

    @property
    def blocks_in_use(self) -> tuple[int, int]:
        """(referenced, draining)."""
        counts = self.engine.pool.counts()
        return counts.referenced, counts.draining
