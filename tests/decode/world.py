"""Decode workers, a prefill side and routers in one process: real engines, real transfers, messages as on the wire."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from decode_service.core import DecodeCore
from decode_service.event_loop_post import EventLoopPost
from decode_service.move_sender import MoveSender
from decode_service.ownership_report import OwnershipReport
from decode_service.ports import DecodePorts
from decode_service.server import DecodeServer
from decode_service.session_requests import DecodeAddress
from decode_service.step_loop import DecodeLoop
from decode_service.step_messages import Emission, HandedOver
from isthmus.checkpoint.directory import Checkpoint
from isthmus.clock import Clock, SystemClock
from isthmus.convert import request_to_proto, target_from_proto, token_from_proto
from isthmus.engine.engine import Engine
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.open_runner import open_decoder
from isthmus.engine.runner import TorchRunner
from isthmus.engine.sampler import sample
from isthmus.failpoints import Failpoints
from isthmus.ids import SystemIds
from isthmus.kv.layout import Plane, PlaneKind
from isthmus.kv.planes import LATENT
from isthmus.ledger import Ledger
from isthmus.metrics import Metrics
from isthmus.process.admin import Identity
from isthmus.process.health import HealthState, ProgressWatch
from isthmus.process.worker_context import WorkerContext
from isthmus.steps import DecodeRow, PrefillChunk, SamplingInput
from isthmus.testing.block_pool_check import check_partition
from isthmus.testing.manual_clock import ManualClock
from isthmus.types import Request, SamplingParams, Token
from isthmus.v1 import decode_pb2, types_pb2
from isthmus.worker.engine_start import transfer_memory
from isthmus.worker.instruments import Instruments
from isthmus.worker.step_thread import StepThread
from kv_transfer.outgoing import OutgoingTransfer, TransferOutcome
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.mirror_task import MirrorTask
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ReceiverOptions, TransferEvents
from kv_transfer.sender import Sender
from tests.engine.engines import poison

WAIT_S = 20.0
DRAFTING = "+drafting"
DRAFT = Plane("draft", PlaneKind.APPEND_ONLY, 2, 6, "fp32", advisory=True)
SEEDED = SamplingParams(
    max_tokens=40, temperature=1.0, top_p=0.9, logprobs=2, frequency_penalty=0.5, repetition_penalty=1.1
)


@cache
def engine(name: str) -> Engine:
    """One per name, so that workers have pools of their own; with a drafting plane if the name ends in `DRAFTING`."""
    opened = Engine.open(Checkpoint.open("bundled"), num_blocks=96)
    if not name.endswith(DRAFTING):
        return opened
    layout = replace(opened.layout, planes=(*opened.layout.planes, DRAFT))
    cache = LatentCache(layout, opened.pool.num_blocks, opened.device)
    runner = TorchRunner(opened.runner.model, cache)
    return replace(opened, layout=layout, cache=cache, runner=runner, decoder=open_decoder(runner))


def request(num_prompt_tokens: int = 50, sampling: SamplingParams = SEEDED, **fields: Any) -> Request:
    prompt = tuple((31 * i + 7) % 2000 + 10 for i in range(num_prompt_tokens))
    return Request(SystemIds().incarnation(), seed=1234, prompt_token_ids=prompt, sampling=sampling, **fields)


class Prefill:
    """Computes prompts and sends what a target misses."""

    def __init__(self) -> None:
        self.engine = engine("prefill")
        self.sender = Sender(
            SystemIds().incarnation(),
            PoolMemory(self.engine.layout, transfer_memory(self.engine)),
            Ledger(SystemClock()),
            SystemClock(),
        ).start()

    def compute(self, request: Request) -> tuple[list[int], Token]:
        """The prompt's blocks and token 0."""
        table = self.engine.pool.allocate(self.engine.layout.num_blocks(len(request.prompt_token_ids)))
        logits = self.engine.runner.prefill([PrefillChunk(request.prompt_token_ids, 0, table, needs_logits=True)])
        return table, one(sample(logits, [SamplingInput(request, ())]))

    def begin(self, request: Request, reserved: decode_pb2.Reserved) -> "Filling":
        table, token = self.compute(request)
        done: asyncio.Future[TransferOutcome] = asyncio.get_running_loop().create_future()
        loop = asyncio.get_running_loop()
        transfer = self.sender.open(
            target_from_proto(reserved, self.engine.layout),
            table,
            lambda outcome: loop.call_soon_threadsafe(done.set_result, outcome),
        )
        self.engine.pool.release(table)  # nobody else uses this pool meanwhile
        return Filling(transfer, token, done, self.engine.layout.planes[0].num_layers, len(request.prompt_token_ids))

    def num_acked(self, filling: "Filling") -> int:
        """Frames of a transfer that goes on."""
        state = self.sender._core._transfers.get(filling.transfer.number)
        return 0 if state is None else state.outcome.frames

    async def fill(self, request: Request, reserved: decode_pb2.Reserved) -> TransferOutcome:
        filling = self.begin(request, reserved)
        filling.rows()
        filling.transfer.commit(filling.token)
        return await asyncio.wait_for(filling.done, WAIT_S)


@dataclass
class Filling:
    transfer: OutgoingTransfer
    token: Token
    done: "asyncio.Future[TransferOutcome]"
    num_layers: int
    num_rows: int

    def rows(self, layers: Iterable[int] | None = None) -> None:
        for layer in range(self.num_layers) if layers is None else layers:
            self.transfer.rows_ready(LATENT, layer, 0, self.num_rows)


def one(results: Sequence[Any]) -> Token:
    (token,) = results
    assert isinstance(token, Token)
    return token


def oracle(request: Request) -> list[Token]:
    """What the request gives, computed one row at a time without any worker."""
    return _oracle(replace(request, request_id=""))


@cache
def _oracle(request: Request) -> list[Token]:
    reference = engine("prefill")
    num_positions = len(request.prompt_token_ids) + request.sampling.max_tokens
    table = reference.pool.allocate(reference.layout.num_blocks(num_positions))
    logits = reference.runner.prefill([PrefillChunk(request.prompt_token_ids, 0, table, needs_logits=True)])
    tokens = [one(sample(logits, [SamplingInput(request, ())]))]
    while len(tokens) < request.sampling.max_tokens:
        position = len(request.prompt_token_ids) + len(tokens) - 1
        logits = reference.runner.decode([DecodeRow(tokens[-1].id, position, table)])
        tokens.append(one(sample(logits, [SamplingInput(request, [token.id for token in tokens])])))
    reference.pool.release(table)
    return tokens


class Worker:
    """One decode worker without its process. `hold` keeps its step loop between two steps."""

    def __init__(self, name: str, store: MemoryOwnership, clock: Clock, failpoints: str = "", max_batch: int = 8):
        self.engine = engine(name)
        self.engine.pool.release(self.engine.pool.allocate(self.engine.pool.num_blocks))  # nothing is cached
        poison(self.engine)
        self.clock = clock
        self.identity = Identity(name, "decode", SystemIds().incarnation())
        watch = ProgressWatch(clock)
        self.context = WorkerContext(
            self.identity, clock, Ledger(clock), Metrics(), HealthState(watch), _Gated(failpoints, self)
        )
        self.mirror = MirrorTask(store, SystemClock(), lambda: self.streams.restate())
        self.report = OwnershipReport(self.mirror.report, self.identity.incarnation)
        self.crashes: list[BaseException] = []
        self.post = EventLoopPost(clock, self.crashes.append)
        self.memory = PoolMemory(self.engine.layout, transfer_memory(self.engine))
        events = TransferEvents(
            on_ready=lambda claim: self.post(lambda now: self.streams.claimed(claim, now)),
            on_failed=lambda failure: self.post(lambda now: self.streams.failed(failure, now)),
            on_state=self.report.handoff_changed,
        )
        ledger = self.context.ledger
        self.receiver = Receiver(
            self.identity.incarnation, self.memory, ledger, events, clock, ReceiverOptions()
        ).start()
        self.identity.zmq_endpoint = self.receiver.endpoint
        self.may_step = threading.Event()
        self.may_step.set()
        self.may_begin_step = threading.Event()
        self.may_begin_step.set()
        self.num_steps_allowed: int | None = None  # then `may_begin_step` is cleared; None: no bound
        self.sender = MoveSender(self._open_sender, self.post)
        instruments = Instruments(self.context.ledger, self.context.failpoints, self.context.progress)
        self.step_loop = DecodeLoop(self.engine, max_batch, instruments, self.stepped, self.handed_over)
        self.step_thread = StepThread("decode-step", clock, idle_wait_s=0.2, on_crash=self.crashes.append)
        post_step = self.step_thread.add(self.step_loop)
        ports = DecodePorts(self.receiver, self.sender, self.report, post_step, SystemIds())
        address = DecodeAddress(self.identity.incarnation, self.identity.zmq_endpoint)
        self.core = DecodeCore.build(self.engine, ports, instruments, address, 10.0)
        self.streams = self.core.streams
        self.table = self.streams.table
        self.server = DecodeServer(clock)
        self.server.open(self.core)
        self.step_thread.start()
        self._mirroring = asyncio.create_task(self.mirror.run())

    def sweep(self) -> None:
        self.core.attachments.sweep(self.clock.now())

    def stepped(self, emissions: Sequence[Emission]) -> None:
        assert self.may_step.wait(WAIT_S)
        self.post(lambda now: self.streams.deliver(emissions, now))

    def handed_over(self, handed_over: HandedOver) -> None:
        self.post(lambda now: self.core.mover.handed_over(handed_over, now))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No step ends meanwhile."""
        self.may_step.clear()
        try:
            yield
        finally:
            self.may_step.set()

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Its receiver takes nothing in meanwhile."""
        with self.receiver._lock:
            yield

    def events(self, request_id: str) -> list[str]:
        return [event.event for event in self.context.ledger.read(request_id=request_id)]

    def event(self, request_id: str, name: str) -> dict[str, str]:
        (event,) = (e for e in self.context.ledger.read(request_id=request_id) if e.event == name)
        return event.fields

    async def close(self) -> None:
        """Everything is given back, whatever the test did."""
        self.may_step.set()
        self.may_begin_step.set()
        self.num_steps_allowed = None
        self.core.attachments.abandon_all(self.clock.now())
        self.sender.close()
        await asyncio.to_thread(self.step_thread.stop)
        self.receiver.close()
        await asyncio.sleep(0)
        await self.mirror.flush(1.0)
        self._mirroring.cancel()
        assert self.engine.pool.counts().referenced == 0, "a block leaked"
        check_partition(self.engine.pool)
        assert not self.crashes

    def _open_sender(self) -> Sender:
        return Sender(self.identity.incarnation, self.memory, self.context.ledger, self.clock).start()


class _Gated(Failpoints):
    """A failpoint that waits: no step begins while the worker's `may_begin_step` is clear."""

    def __init__(self, spec: str, worker: Worker):
        super().__init__(point for points in Failpoints.parse(spec)._by_name.values() for point in points)
        self._worker = worker

    def hit(self, name: str) -> str | None:
        if name == "decode.step":
            assert self._worker.may_begin_step.wait(WAIT_S)
            if self._worker.num_steps_allowed is not None:
                self._worker.num_steps_allowed -= 1
                if self._worker.num_steps_allowed == 0:
                    self._worker.may_begin_step.clear()
        return super().hit(name)


@dataclass
class Router:
    """A router's side of one session, message by message. Every stream's tokens must come in order, without a gap."""

    worker: Worker
    incarnation: str = field(default_factory=SystemIds().incarnation)
    tokens_of: dict[str, list[Token]] = field(default_factory=dict[str, list[Token]])
    _first: dict[str, int] = field(default_factory=dict[str, int])  # index of the first of `tokens_of`
    _requests: "asyncio.Queue[decode_pb2.SessionRequest]" = field(default_factory=asyncio.Queue)
    _heard: "asyncio.Queue[decode_pb2.SessionResponse | None]" = field(default_factory=asyncio.Queue)
    _task: "asyncio.Task[None] | None" = None

    async def connect(self, **next_index: int) -> decode_pb2.DecodeHello:
        self._requests, self._heard = asyncio.Queue(), asyncio.Queue()
        self.tokens_of.clear()
        cursors = [decode_pb2.StreamCursor(request_id=name, next_index=index) for name, index in next_index.items()]
        self.say(hello=decode_pb2.RouterHello(router_incarnation=self.incarnation, streams=cursors))
        self._task = asyncio.create_task(self._converse())
        return (await self.next("hello")).hello

    async def lose(self) -> None:
        """The connection ends; nothing is said."""
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def say(self, **message: Any) -> None:
        self._requests.put_nowait(decode_pb2.SessionRequest(**message))

    def key(self, counter: int) -> decode_pb2.AttachId:
        return decode_pb2.AttachId(router_incarnation=self.incarnation, counter=counter)

    async def next(self, kind: str) -> decode_pb2.SessionResponse:
        """The next message; it has to be of this kind."""
        message = await self._hear()
        assert message.WhichOneof("message") == kind, message
        return message

    async def until(self, kind: str) -> decode_pb2.SessionResponse:
        """The next message of this kind; only tokens may come before."""
        while (message := await self._hear()).WhichOneof("message") != kind:
            assert message.WhichOneof("message") == "step", message
        return message

    async def was_heard(self) -> None:
        """The worker has followed everything said so far."""
        self.say(attach=decode_pb2.Attach(request_id="nobody's"))
        assert (await self.until("refused")).refused.request_id == "nobody's"

    async def reserve(self, request: Request, counter: int = 1, **terms: Any) -> decode_pb2.Reserved:
        reserve = decode_pb2.Reserve(request=request_to_proto(request), attach=self.key(counter), **terms)
        self.tokens_of.pop(request.request_id, None)
        self.say(reserve=reserve)
        return (await self.until("reserved")).reserved

    async def start(self, prefill: Prefill, request: Request, counter: int = 1, **terms: Any) -> decode_pb2.Reserved:
        """Reserved and filled; its tokens follow."""
        reserved = await self.reserve(request, counter, **terms)
        outcome = await prefill.fill(request, reserved)
        assert outcome.acked, outcome
        return reserved

    async def attach(self, request_id: str, next_index: int) -> decode_pb2.Attached:
        self.tokens_of.pop(request_id, None)
        self.say(attach=decode_pb2.Attach(request_id=request_id, next_index=next_index))
        return (await self.next("attached")).attached

    async def tokens(self, request_id: str, first: int, num: int) -> list[Token]:
        """The tokens [first, first + num), and what came with them."""
        while len(self.tokens_of.get(request_id, ())) < num:
            await self.next("step")
        assert self._first[request_id] == first
        return self.tokens_of[request_id]

    async def rest(self, request_id: str, first: int) -> tuple[list[Token], decode_pb2.StreamEnded]:
        """All tokens from `first` on, and the end."""
        ended = (await self.until("ended")).ended
        assert (ended.request_id, self._first.get(request_id, first)) == (request_id, first)
        return self.tokens_of.get(request_id, []), ended

    def heard_nothing(self) -> bool:
        return self._heard.empty()

    async def _hear(self) -> decode_pb2.SessionResponse:
        message = await asyncio.wait_for(self._heard.get(), WAIT_S)
        assert message is not None, "the session ended"
        for part in message.step.streams:
            if part.request_id not in self.tokens_of:
                self._first[part.request_id] = part.index
            tokens = self.tokens_of.setdefault(part.request_id, [])
            assert part.index == self._first[part.request_id] + len(tokens), "a gap or a repeated token"
            tokens += map(token_from_proto, part.tokens)
        return message

    async def _converse(self) -> None:
        async for message in self.worker.server.Session(self._said(), None):  # type: ignore[arg-type]
            self._heard.put_nowait(message)
        self._heard.put_nowait(None)

    async def _said(self) -> AsyncIterator[decode_pb2.SessionRequest]:
        while True:
            yield await self._requests.get()


@contextlib.asynccontextmanager
async def world(*names: str, failpoints: str = "") -> AsyncIterator["World"]:
    clock, store = ManualClock(), MemoryOwnership(SystemClock())
    built = World(clock, store, [Worker(name, store, clock, failpoints) for name in names], Prefill())
    try:
        yield built
    finally:
        for router in built.routers:
            await router.lose()
        for worker in built.workers:
            await worker.close()
        built.prefill.sender.close()


@dataclass
class World:
    clock: ManualClock
    store: MemoryOwnership
    workers: list[Worker]
    prefill: Prefill
    routers: list[Router] = field(default_factory=list)

    async def router(self, worker: int = 0, incarnation: str | None = None) -> Router:
        router = Router(self.workers[worker], incarnation or SystemIds().incarnation())
        self.routers.append(router)
        await router.connect()
        return router


RETAIN = types_pb2.ON_DISCONNECT_RETAIN


async def until(condition: Callable[[], Any], what: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - threads announce nothing
            await asyncio.sleep(0.002)
    assert condition(), what
