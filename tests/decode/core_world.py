"""A decode worker's cores without threads, sockets or real time: the test is their driver, and moves everything."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from decode_service.core import DecodeCore
from decode_service.ports import DecodePorts, OnMoved
from decode_service.session import RouterSession
from decode_service.session_requests import DecodeAddress
from decode_service.step_loop import DecodeLoop
from decode_service.step_messages import Emission, HandedOver
from decode_service.stream import Phase, ServedStream
from isthmus.convert import request_to_proto, token_from_proto
from isthmus.errors import StaleOwner
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.process.health import ProgressWatch
from isthmus.testing.block_pool_check import check_partition
from isthmus.testing.fake_decode_engine import FakeDecodeEngine
from isthmus.testing.hash_model import next_token
from isthmus.testing.manual_clock import ManualClock
from isthmus.text.finish import finish_reason
from isthmus.types import Extent, Request, SamplingParams, Token, TransferTarget
from isthmus.v1 import decode_pb2, types_pb2
from isthmus.worker.instruments import Instruments
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer
from kv_transfer.transfers import Reservation

FILL_TIMEOUT_S = 10.0
RETAIN = {"on_disconnect": types_pb2.ON_DISCONNECT_RETAIN, "retention_s": 30}


def request(
    name: str = "a", num_prompt_tokens: int = 20, max_tokens: int = 8, seed: int = 1, **sampling: Any
) -> Request:
    prompt = tuple(7 * position + len(name) for position in range(num_prompt_tokens))
    return Request(name, seed=seed, prompt_token_ids=prompt, sampling=SamplingParams(max_tokens, **sampling))


def expected(asked: Request, context_length: int = 4096) -> list[int]:
    """The ids that the request gives, up to its end."""
    ids: list[int] = []
    while True:
        ids.append(next_token(asked, ids))
        if finish_reason(asked, ids, context_length) is not None:
            return ids


@dataclass
class FakeReceiver:
    """Notes what it is told."""

    reserved: dict[str, Reservation] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    cancelled: dict[str, str] = field(default_factory=dict)
    missing: tuple[Extent, ...] = ()  # after a rearm
    num_restated: int = 0

    def reserve(self, reservation: Reservation) -> None:
        self.reserved[reservation.transfer_id] = reservation

    def rearm(self, transfer_id: str, attempt: int, deadline: float) -> tuple[Extent, ...]:
        if attempt <= self.reserved[transfer_id].attempt:
            raise StaleOwner("attempt")
        return self.missing

    def cancel(self, transfer_id: str, cause: str) -> bool:
        self.cancelled[transfer_id] = cause
        return True

    def release(self, transfer_id: str) -> bool:
        self.released.append(transfer_id)
        return True

    def restate(self) -> None:
        self.num_restated += 1


@dataclass
class FakeMove:
    """A transfer on its way out; the test says when it is done."""

    target: TransferTarget
    blocks: Sequence[int]
    on_done: OnMoved
    rows: list[tuple[str, int, int, int]] = field(default_factory=list)
    committed: tuple[Token, ...] | None = None
    aborted: str = ""

    def rows_ready(self, plane: str, layer: int, first: int, n: int) -> None:
        self.rows.append((plane, layer, first, n))

    def commit(self, *tokens: Token) -> None:
        self.committed = tokens

    def abort(self, reason: str) -> None:
        self.aborted = reason


@dataclass
class FakeSender:
    moves: list[FakeMove] = field(default_factory=list)
    refusal: Exception | None = None

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnMoved, *, request_id: str
    ) -> FakeMove:
        if self.refusal is not None:
            raise self.refusal
        self.moves.append(FakeMove(target, block_table, on_done))
        return self.moves[-1]


@dataclass
class FakeReport:
    """The streams that the store would name."""

    streams: set[str] = field(default_factory=set)

    def stream_began(self, request_id: str) -> None:
        self.streams.add(request_id)

    def stream_ended(self, request_id: str) -> None:
        self.streams.discard(request_id)


class CountedIds:
    """Ids that a reader can tell apart."""

    def __init__(self) -> None:
        self._number = 0

    def transfer_id(self) -> str:
        self._number += 1
        return f"{self._number:032x}"

    request_id = incarnation = transfer_id

    def seed(self) -> int:
        return 0

    def fraction(self) -> float:
        return 0.5


class CoreWorld:
    """`now` moves when the test says so. What the step loop gives waits in `results` until `deliver`."""

    def __init__(self, *, num_blocks: int = 64, max_batch: int = 8, runs_ahead: bool = False, **engine: Any):
        self.clock = ManualClock()
        self.engine = FakeDecodeEngine(num_blocks, runs_ahead=runs_ahead, **engine)
        self.ledger = Ledger(self.clock)
        instruments = Instruments(self.ledger, Failpoints(), ProgressWatch(self.clock))
        self.results: deque[Sequence[Emission] | HandedOver] = deque()
        self.loop = DecodeLoop(self.engine, max_batch, instruments, self.results.append, self.results.append)
        self.receiver = FakeReceiver()
        self.sender = FakeSender()
        self.report = FakeReport()
        ports = DecodePorts(self.receiver, self.sender, self.report, self.loop.take, CountedIds())
        address = DecodeAddress("12" * 16, "tcp://here")
        self.core = DecodeCore.build(self.engine, ports, instruments, address, FILL_TIMEOUT_S)

    @property
    def now(self) -> float:
        return self.clock.now()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def router(self, name: str = "r", **next_index: int) -> "FakeRouter":
        """A router that has said hello; `next_index` by request."""
        return FakeRouter(self, name, next_index)

    def stream(self, request_id: str = "a") -> ServedStream:
        stream = self.core.streams.table.get(request_id)
        assert stream is not None
        return stream

    def claim(self, asked: Request, num_tokens: int = 1) -> None:
        """Every row of the prompt, and of all tokens but the last, comes; and the commit."""
        stream = self.stream(asked.request_id)
        assert stream.run is not None
        ids = expected(asked)[:num_tokens]
        self.engine.fill(stream.run.block_table, [*asked.prompt_token_ids, *ids[:-1]])
        tokens = tuple(Token(token_id) for token_id in ids)
        self.core.streams.claimed(ClaimedTransfer(stream.transfer_id, asked.request_id, tokens), self.now)

    def fail(self, request_id: str, *, is_ended: bool, finished: bool = False) -> None:
        stream = self.stream(request_id)
        failure = FailedTransfer(
            stream.transfer_id, request_id, stream.attempt, stream.missing, "gone", is_ended, finished
        )
        self.core.streams.failed(failure, self.now)

    def turn(self) -> bool:
        """One turn of the step loop; whether there is more to do."""
        return self.loop.turn(self.now) is not None

    def deliver(self) -> None:
        """The event loop hears everything that the step loop gave."""
        while self.results:
            result = self.results.popleft()
            if isinstance(result, HandedOver):
                self.core.mover.handed_over(result, self.now)
            else:
                self.core.streams.deliver(result, self.now)

    def step(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.turn()
            self.deliver()

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.turn() or self.results:
            self.deliver()

    def finish_move(self, failure: str = "") -> None:
        move = self.sender.moves[-1]
        move.on_done(TransferOutcome(len(move.blocks), acked=not failure, failure=failure), self.now)

    def sweep(self) -> None:
        self.core.attachments.sweep(self.now)

    def check_nothing_left(self) -> None:
        assert len(self.core.streams.table) == 0
        assert len(self.loop._scheduler) == 0
        assert self.engine.pool.counts().referenced == 0
        assert self.engine.pool.counts().draining == 0
        check_partition(self.engine.pool)

    def events(self, request_id: str = "a") -> list[str]:
        return [event.event for event in self.ledger.read(request_id=request_id)]


class FakeRouter:
    """A router's side of one session: says messages, and takes those that it is sent when it reads."""

    def __init__(self, world: CoreWorld, name: str, next_index: dict[str, int]):
        self.world = world
        self.name = name
        self.session = RouterSession(name, lambda: None)
        self._tokens_of: dict[str, list[int]] = {}
        self._first: dict[str, int] = {}
        cursors = [decode_pb2.StreamCursor(request_id=key, next_index=index) for key, index in next_index.items()]
        hello = decode_pb2.SessionRequest(hello=decode_pb2.RouterHello(router_incarnation=name, streams=cursors))
        world.core.requests.greet(hello, self.session, world.now)
        self.hello = self.read()[0].hello if not next_index else None

    def key(self, counter: int = 1) -> decode_pb2.AttachId:
        return decode_pb2.AttachId(router_incarnation=self.name, counter=counter)

    def say(self, **message: Any) -> None:
        self.world.core.requests.follow(decode_pb2.SessionRequest(**message), self.session, self.world.now)

    def reserve(self, asked: Request, counter: int = 1, **terms: Any) -> None:
        reserve = decode_pb2.Reserve(request=request_to_proto(asked), attach=self.key(counter), **terms)
        self.say(reserve=reserve)

    def start(self, asked: Request, counter: int = 1, **terms: Any) -> None:
        """Reserved and claimed with token 0."""
        self.reserve(asked, counter, **terms)
        self.world.claim(asked)

    def attach(self, request_id: str, next_index: int = 0) -> None:
        self.say(attach=decode_pb2.Attach(request_id=request_id, next_index=next_index))

    def cancel(self, request_id: str, counter: int = 1) -> None:
        self.say(cancel=decode_pb2.CancelStream(request_id=request_id, attach=self.key(counter)))

    def move(self, request_id: str, counter: int = 1) -> None:
        """To a worker that misses every row of the prompt and of the tokens."""
        layout = self.world.engine.layout
        target = decode_pb2.Reserved(
            transfer_id="ef" * 16, attempt=1, incarnation="34" * 16, layout_fingerprint=layout.fingerprint
        )
        self.say(move=decode_pb2.Move(request_id=request_id, attach=self.key(counter), target=target))

    def lose(self) -> None:
        self.session.close()
        self.world.core.attachments.lost(self.session, self.world.now)

    def read(self) -> list[decode_pb2.SessionResponse]:
        """Everything sent since the last read; a stream's tokens have to come in order, without a gap."""
        heard: list[decode_pb2.SessionResponse] = []
        while (message := self.session.next_message()) is not None:
            heard.append(message)
            for part in message.step.streams:
                first = self._first.setdefault(part.request_id, part.index)
                tokens = self._tokens_of.setdefault(part.request_id, [])
                assert part.index == first + len(tokens), "a gap or a repeated token"
                tokens += [token_from_proto(token).id for token in part.tokens]
        return heard

    def tokens(self, request_id: str = "a") -> list[int]:
        """Everything that this session was sent of a stream."""
        self.read()
        return self._tokens_of.get(request_id, [])

    def forget(self, request_id: str) -> None:
        """Its tokens are counted anew: they come from another reservation."""
        self.read()
        self._tokens_of.pop(request_id, None)
        self._first.pop(request_id, None)

    def kinds(self) -> list[str | None]:
        """The kinds of the messages sent since the last read."""
        return [message.WhichOneof("message") for message in self.read()]

    def last(self, kind: str) -> Any:
        """The content of the last message since the last read, which has to be of this kind."""
        message = self.read()[-1]
        assert message.WhichOneof("message") == kind, message
        return getattr(message, kind)


def begin_move(world: CoreWorld, router: FakeRouter, name: str = "a", num_steps: int = 3) -> None:
    """The stream's blocks are on their way to another worker."""
    router.start(request(name))
    world.step(num_steps)
    router.move(name)
    world.step()
    assert world.stream(name).phase is Phase.MOVING
    router.read()
