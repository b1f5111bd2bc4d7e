"""Scripted prefill and decode workers behind real gRPC ports, and a router over them and an in-memory registry."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import grpc.aio

from isthmus.clock import SystemClock
from isthmus.config import RouterConfig
from isthmus.convert import layout_to_proto
from isthmus.errors import IsthmusError, NoFreeBlocks
from isthmus.ids import SystemIds
from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.ledger import Ledger
from isthmus.metrics import Metrics
from isthmus.process.rpc import PUBLIC_RECEIVE_BYTES, channel, create_server
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.vocabulary import Vocabulary
from isthmus.text.workers import TextWorkers
from isthmus.types import BlockCounts
from isthmus.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    types_pb2,
)
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.store import WorkerLoad, WorkerRecord
from router.admission import Admission
from router.dispatch import Dispatch, DispatchSettings
from router.locate import Locator
from router.placement import Placement
from router.server import Backend, InferenceServer
from router.validate import ModelFacts
from router.worker_pool import WorkerPool

MODEL_DIGEST = "d" * 32
NUMERICS = "n" * 32
LAYOUT = KvLayout(MODEL_DIGEST, (Plane("latent", PlaneKind.APPEND_ONLY, 2, 8, "fp32"),), 16)
VOCAB_SIZE = 300  # bytes, then ids without text
EOS = 256
MODEL = ModelFacts("tiny", "deepseek_v3", MODEL_DIGEST, VOCAB_SIZE, context_length=4096, eos_token_ids=(EOS,))
SCRIPT = b"The quick brown fox jumps over the lazy dog. "


class ByteTokenizer:
    """Token ids are bytes."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self._vocabulary = Vocabulary(tuple(bytes([i]) for i in range(256)) + (b"",) * (VOCAB_SIZE - 256), False)

    def encode(self, text: str, *, max_bytes: int = 0, max_tokens: int | None = None) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Any, *, max_bytes: int = 0) -> list[int]:
        return [byte for message in messages for byte in f"<{message.role}>{message.content}".encode()]

    def decode(self, token_ids: Any) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def detokenizer(self, stop: Any = (), *, include_stop: bool = False) -> Detokenizer:
        return Detokenizer(self._vocabulary, stop, include_stop=include_stop)


def script_token(request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
    """The pure function both fakes compute."""
    return types_pb2.Token(id=SCRIPT[index % len(SCRIPT)])


@dataclass(eq=False)
class FakeStream:
    request: types_pb2.EngineRequest
    counter: int
    transfer_id: str
    outgoing: "asyncio.Queue[decode_pb2.SessionResponse]"
    attempt: int = 1
    num_sent: int = 0
    task: asyncio.Task[None] | None = None


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Decodes `script_token` once a FakePrefill commits. Everything it was told is kept."""

    def __init__(self, name: str = "d0") -> None:
        self.name = name
        self.incarnation = SystemIds().incarnation()
        self.address = ""
        self.streams: dict[str, FakeStream] = {}
        self.reserves: list[decode_pb2.Reserve] = []
        self.cancels: list[decode_pb2.CancelStream] = []
        self.ended: list[str] = []
        self.refuse: Callable[[decode_pb2.Reserve], IsthmusError | None] = lambda reserve: None
        self.token = script_token
        self.cluster_commit: Callable[[str], object] = lambda transfer_id: None
        self.max_tokens_sent: int | None = None  # then it falls silent
        self.token_interval_s = 0.0
        self.answers_reserve = True
        self.is_leaving = False  # says so before it answers a reservation
        self.answer_delays_s: Iterator[float] = iter(())  # of reservations, one after the other
        self.tokens_per_step = 1
        self.total_blocks = 1000
        self.lose_sessions = asyncio.Event()
        self.keeps_streams = False  # of a lost session
        self.hellos: list[decode_pb2.RouterHello] = []
        self.rearms: list[decode_pb2.Rearm] = []
        self.moves: list[decode_pb2.Move] = []

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[decode_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        outgoing: asyncio.Queue[decode_pb2.SessionResponse] = asyncio.Queue()
        first = await anext(request_iterator)
        self.hellos.append(first.hello)
        named = [cursor.request_id for cursor in first.hello.streams]
        hello = decode_pb2.DecodeHello(
            incarnation=self.incarnation,
            layout=layout_to_proto(LAYOUT),
            numerics_digest=NUMERICS,
            unknown_streams=[request_id for request_id in named if request_id not in self.streams],
        )
        outgoing.put_nowait(decode_pb2.SessionResponse(hello=hello))
        for cursor in first.hello.streams:
            if stream := self.streams.get(cursor.request_id):
                stream.outgoing = outgoing
                self._start(stream, cursor.next_index)
        reader = asyncio.create_task(self._read(request_iterator, outgoing))
        lost = asyncio.create_task(self.lose_sessions.wait())
        try:
            while not self.lose_sessions.is_set():
                getter = asyncio.create_task(outgoing.get())
                await asyncio.wait({getter, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not getter.done():
                    getter.cancel()
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
                yield getter.result()
        finally:
            for task in (reader, lost):
                task.cancel()
            await asyncio.gather(reader, lost, return_exceptions=True)
            for stream in [s for s in self.streams.values() if s.outgoing is outgoing and not self.keeps_streams]:
                self._drop(stream)

    async def _read(self, messages: AsyncIterator[decode_pb2.SessionRequest], outgoing: Any) -> None:
        async for message in messages:
            match message.WhichOneof("message"):
                case "reserve":
                    self._reserve(message.reserve, outgoing)
                case "cancel":
                    self.cancels.append(message.cancel)
                    if stream := self.streams.get(message.cancel.request_id):
                        self._end(stream, message.cancel.finish_reason, 0)
                case "rearm":
                    self.rearms.append(message.rearm)
                    self._rearm(message.rearm, outgoing)
                case "attach":
                    self._attach(message.attach, outgoing)
                case "move":
                    self._move(message.move, outgoing)
                case _:
                    pass

    def _reserve(self, reserve: decode_pb2.Reserve, outgoing: Any) -> None:
        self.reserves.append(reserve)
        request_id = reserve.request.request_id
        if not self.answers_reserve:
            return
        if self.is_leaving:
            outgoing.put_nowait(decode_pb2.SessionResponse(leaving=decode_pb2.Leaving()))
        error = self.refuse(reserve)
        if error is not None:
            counter = reserve.attach.counter
            refused = decode_pb2.Refused(
                request_id=request_id, counter=counter, reason=error.reason, detail=error.detail
            )
            outgoing.put_nowait(decode_pb2.SessionResponse(refused=refused))
            return
        transfer_id = SystemIds().transfer_id()
        self.streams[request_id] = FakeStream(reserve.request, reserve.attach.counter, transfer_id, outgoing)
        num_prompt_tokens = len(reserve.request.prompt_token_ids)
        reserved = decode_pb2.Reserved(
            request_id=request_id,
            counter=reserve.attach.counter,
            transfer_id=transfer_id,
            attempt=1,
            zmq_endpoint="tcp://127.0.0.1:1",
            incarnation=self.incarnation,
            layout_fingerprint=LAYOUT.fingerprint,
            missing=[types_pb2.Extent(plane=0, layer=0, first_token=0, num_tokens=num_prompt_tokens)],
        )
        answer = decode_pb2.SessionResponse(reserved=reserved)
        asyncio.get_running_loop().call_later(next(self.answer_delays_s, 0.0), outgoing.put_nowait, answer)

    async def Find(self, request: decode_pb2.FindRequest, context: Any) -> decode_pb2.FindResponse:  # noqa: N802
        return decode_pb2.FindResponse(found=request.request_id in self.streams)

    def leave(self) -> None:
        """Asks every router to move its streams away."""
        for outgoing in {id(s.outgoing): s.outgoing for s in self.streams.values()}.values():
            outgoing.put_nowait(decode_pb2.SessionResponse(leaving=decode_pb2.Leaving()))

    def _rearm(self, rearm: decode_pb2.Rearm, outgoing: Any) -> None:
        stream = self.streams.get(rearm.request_id)
        if stream is None or stream.task is not None:
            counter = rearm.attach.counter
            refused = decode_pb2.Refused(
                request_id=rearm.request_id, counter=counter, reason="STALE_OWNER", detail="claimed"
            )
            outgoing.put_nowait(decode_pb2.SessionResponse(refused=refused))
            return
        stream.attempt = rearm.attempt
        missing = [types_pb2.Extent(plane=0, layer=1, first_token=0, num_tokens=1)]
        rearmed = decode_pb2.Rearmed(
            request_id=rearm.request_id, transfer_id=stream.transfer_id, attempt=rearm.attempt, missing=missing
        )
        outgoing.put_nowait(decode_pb2.SessionResponse(rearmed=rearmed))

    def _attach(self, attach: decode_pb2.Attach, outgoing: Any) -> None:
        stream = self.streams.get(attach.request_id)
        if stream is None:
            refused = decode_pb2.Refused(request_id=attach.request_id, reason="STREAM_GONE", detail="not here")
            outgoing.put_nowait(decode_pb2.SessionResponse(refused=refused))
            return
        stream.counter += 1
        now = decode_pb2.AttachId(router_incarnation=attach.attach.router_incarnation, counter=stream.counter)
        if stream.outgoing is not outgoing:
            detached = decode_pb2.Detached(request_id=attach.request_id, attach=now)
            stream.outgoing.put_nowait(decode_pb2.SessionResponse(detached=detached))
        stream.outgoing = outgoing
        request = types_pb2.EngineRequest()
        request.CopyFrom(stream.request)
        request.emitted_token_ids[:] = [self.token(stream.request, i).id for i in range(stream.num_sent)]
        attached = decode_pb2.Attached(
            request=request,
            attach=now,
            next_index=attach.next_index,
            on_disconnect=types_pb2.ON_DISCONNECT_RETAIN,
            retention_s=30,
        )
        outgoing.put_nowait(decode_pb2.SessionResponse(attached=attached))
        if stream.task is not None:
            self._start(stream, attach.next_index)

    def _move(self, move: decode_pb2.Move, outgoing: Any) -> None:
        """The target claims at once; nothing is left here."""
        stream = self.streams[move.request_id]
        self.moves.append(move)
        self.cluster_commit(move.target.transfer_id)
        self._drop(stream)
        moved = decode_pb2.Moved(request_id=move.request_id, transfer_id=move.target.transfer_id, acked=True)
        outgoing.put_nowait(decode_pb2.SessionResponse(moved=moved))

    def commit(self, transfer_id: str) -> None:
        """The prompt's blocks and token 0 have arrived."""
        for stream in self.streams.values():
            if stream.transfer_id == transfer_id:
                self._start(stream, len(stream.request.emitted_token_ids))

    def _start(self, stream: FakeStream, index: int) -> None:
        if stream.task is not None:
            stream.task.cancel()
        stream.task = asyncio.create_task(self._decode(stream, index))

    def abort(self, transfer_id: str, *, is_finished: bool) -> None:
        for stream in [s for s in self.streams.values() if s.transfer_id == transfer_id]:
            if is_finished:
                self._drop(stream)
            else:
                failed = decode_pb2.TransferFailed(
                    request_id=stream.request.request_id,
                    attempt=stream.attempt,
                    reason="sender gone",
                    counter=stream.counter,
                )
                stream.outgoing.put_nowait(decode_pb2.SessionResponse(transfer_failed=failed))

    async def _decode(self, stream: FakeStream, first_index: int) -> None:
        num_tokens = stream.request.sampling.max_tokens
        if first_index:  # the sign of the claim
            sent = decode_pb2.StreamTokens(
                request_id=stream.request.request_id, index=first_index, counter=stream.counter
            )
            stream.outgoing.put_nowait(decode_pb2.SessionResponse(step=decode_pb2.StepTokens(streams=[sent])))
            await asyncio.sleep(self.token_interval_s)
        for index in range(first_index, num_tokens, self.tokens_per_step):
            if self.max_tokens_sent is not None and index >= self.max_tokens_sent:
                await asyncio.Event().wait()
            count = min(self.tokens_per_step, num_tokens - index)
            tokens = [self.token(stream.request, i) for i in range(index, index + count)]
            sent = decode_pb2.StreamTokens(
                request_id=stream.request.request_id, index=index, tokens=tokens, counter=stream.counter
            )
            step = decode_pb2.StepTokens(step=index, streams=[sent])
            stream.outgoing.put_nowait(decode_pb2.SessionResponse(step=step))
            stream.num_sent = max(stream.num_sent, index + count)
            if EOS in (token.id for token in tokens):
                self._end(stream, types_pb2.FINISH_REASON_STOP, index + count)
                return
            await asyncio.sleep(self.token_interval_s)
        self._end(stream, types_pb2.FINISH_REASON_LENGTH, num_tokens)

    def _end(self, stream: FakeStream, reason: Any, num_tokens: int) -> None:
        self._drop(stream)
        ended = decode_pb2.StreamEnded(
            request_id=stream.request.request_id, finish_reason=reason, num_tokens=num_tokens, counter=stream.counter
        )
        stream.outgoing.put_nowait(decode_pb2.SessionResponse(ended=ended))

    def _drop(self, stream: FakeStream) -> None:
        self.streams.pop(stream.request.request_id, None)
        self.ended.append(stream.request.request_id)
        if stream.task is not None and stream.task is not asyncio.current_task():
            stream.task.cancel()


class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Token 0 and a commit to the fake decode worker that holds the transfer."""

    def __init__(self, cluster: "Cluster", name: str = "p0") -> None:
        self._cluster = cluster
        self.name = name
        self.incarnation = SystemIds().incarnation()
        self.address = ""
        self.requests: list[prefill_pb2.PrefillRequest] = []
        self.num_cancelled = 0
        self.num_running = 0
        self.token = script_token
        self.fail: Callable[[int], IsthmusError | None] = lambda call: None  # by call number, before the first token
        self.crash: Callable[[int], IsthmusError | None] = lambda call: None  # the same, but with the prompt begun
        self.hold_first_token: asyncio.Event | None = None
        self.commits = True
        self.done = prefill_pb2.Done(
            acked=True,
            prefill_ms=3.0,
            transfer_exposed_ms=0.5,
            transfer_bytes=4096,
            transfer_blocks=2,
            transfer_frames=4,
        )

    async def Prefill(self, request: prefill_pb2.PrefillRequest, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.requests.append(request)
        self.num_running += 1
        is_done = False
        try:
            yield prefill_pb2.PrefillResponse(queued=prefill_pb2.Queued(num_ahead=0))
            if (error := self.fail(len(self.requests))) is not None:
                raise error
            if self.hold_first_token is not None:
                await self.hold_first_token.wait()
            num_tokens = len(request.request.prompt_token_ids)
            yield prefill_pb2.PrefillResponse(progress=prefill_pb2.Progress(num_computed_tokens=num_tokens))
            if (error := self.crash(len(self.requests))) is not None:
                raise error
            token = self.token(request.request, 0)
            reason = None
            if token.id == EOS:
                reason = types_pb2.FINISH_REASON_STOP
            elif request.request.sampling.max_tokens == 1:
                reason = types_pb2.FINISH_REASON_LENGTH
            first = prefill_pb2.FirstToken(token=token, finish_reason=reason, num_cached_tokens=5)
            yield prefill_pb2.PrefillResponse(first_token=first)
            for decode in self._cluster.decode:
                if reason is not None:
                    decode.abort(request.target.transfer_id, is_finished=True)
                elif self.commits:
                    decode.commit(request.target.transfer_id)
            is_done = True
            yield prefill_pb2.PrefillResponse(done=self.done)
        finally:
            self.num_running -= 1
            self.num_cancelled += not is_done


@dataclass(eq=False)
class Cluster:
    """A router and its workers in one loop."""

    store: MemoryOwnership = field(default_factory=lambda: MemoryOwnership(SystemClock()))
    decode: list[FakeDecode] = field(default_factory=list)
    prefill: list[FakePrefill] = field(default_factory=list)
    servers: dict[str, grpc.aio.Server] = field(default_factory=dict)
    records: dict[str, WorkerRecord] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)

    async def add_decode(self, name: str = "d0") -> FakeDecode:
        fake = FakeDecode(name)
        self.decode.append(fake)
        fake.cluster_commit = lambda transfer_id: [other.commit(transfer_id) for other in self.decode]
        await self._serve(fake, lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(fake, server))
        await self.register(_record(fake, "decode"))
        return fake

    async def add_prefill(self, name: str = "p0") -> FakePrefill:
        fake = FakePrefill(self, name)
        self.prefill.append(fake)
        await self._serve(fake, lambda server: prefill_pb2_grpc.add_PrefillServiceServicer_to_server(fake, server))
        await self.register(_record(fake, "prefill"))
        return fake

    async def register(self, record: WorkerRecord) -> None:
        self.records[record.incarnation] = record
        await self.store.put_worker(record, 60.0)

    async def change(self, incarnation: str, **changes: Any) -> None:
        await self.register(replace(self.records[incarnation], **changes))

    async def kill(self, fake: FakeDecode | FakePrefill) -> None:
        await self.store.drop_worker(fake.incarnation)
        await self.servers.pop(fake.incarnation).stop(0)

    async def _serve(self, fake: FakeDecode | FakePrefill, add: Callable[[grpc.aio.Server], None]) -> None:
        server = create_server()
        add(server)
        fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self.servers[fake.incarnation] = server

    async def close(self) -> None:
        for server in self.servers.values():
            await server.stop(0)


@dataclass(eq=False)
class RunningRouter:
    stub: Any
    admission: Admission
    pool: WorkerPool
    server: InferenceServer
    cluster: Cluster
    metrics: Metrics
    address: str

    def call(self, message: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0) -> Any:
        return self.stub.Generate(message, timeout=timeout_s)

    async def generate(self, message: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0) -> "Result":
        """Raises the typed error the router answered with."""
        result = Result()
        try:
            async for response in self.call(message, timeout_s):
                result.take(response)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return result

    async def is_quiet(self) -> None:
        """Waits until nothing of any request is left: here, on the fakes, and among the tasks."""
        async with asyncio.timeout(5):
            while self._left():  # noqa: ASYNC110 - looks at many things that send no event
                await asyncio.sleep(0.01)

    def _left(self) -> list[str]:
        left = [f"stream {request_id} on {d.name}" for d in self.cluster.decode for request_id in d.streams]
        left += [f"{p.num_running} calls on {p.name}" for p in self.cluster.prefill if p.num_running]
        left += [
            f"{worker.num_tokens_ahead} tokens ahead"
            for worker in self.pool.prefill.values()
            if worker.num_tokens_ahead
        ]
        left += [f"{worker.reserved_blocks} blocks" for worker in self.pool.decode.values() if worker.reserved_blocks]
        left += [
            f"{worker.session.num_streams} routed" for worker in self.pool.decode.values() if worker.session.num_streams
        ]
        left += [f"{len(worker.calls)} calls" for worker in self.pool.prefill.values() if worker.calls]
        left += [f"{self.admission.num_streams} slots"] * bool(self.admission.num_streams)
        left += [f"{self.admission.num_queued} queued"] * bool(self.admission.num_queued)
        left += [f"{self.server.num_streams} lives"] * bool(self.server.num_streams)
        left += [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "prefill-call"]
        return left


@dataclass
class Result:
    accepted: inference_pb2.Accepted | None = None
    finished: inference_pb2.Finished | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_chunks: int = 0

    @property
    def start(self) -> inference_pb2.Accepted:
        assert self.accepted is not None
        return self.accepted

    @property
    def end(self) -> inference_pb2.Finished:
        assert self.finished is not None
        return self.finished

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted":
                assert self.accepted is None
                self.accepted = response.accepted
            case "tokens":
                assert response.tokens.index == len(self.token_ids)
                self.token_ids += [token.id for token in response.tokens.tokens]
                self.text += response.tokens.text
                self.num_chunks += 1
            case _:
                assert self.finished is None
                self.finished = response.finished
                self.text += response.finished.text


@contextlib.asynccontextmanager
async def running_router(
    cluster: Cluster, *, max_buffered_tokens: int = 4096, wait: bool = True, **settings: Any
) -> AsyncIterator[RunningRouter]:
    """The router's own parts, wired as its composition root does, without a process around them."""
    config = RouterConfig(name="r0", **settings)
    clock, metrics = SystemClock(), Metrics()
    admission = Admission(config.max_streams, config.max_queue)
    pool = WorkerPool(
        cluster.store,
        incarnation=SystemIds().incarnation(),
        model_digest=MODEL_DIGEST,
        connect=channel,
        clock=clock,
        ledger=cluster.ledger,
    )
    placement = Placement(pool, admission, clock)
    limits = DispatchSettings("router-0", config.queue_timeout_s, max_buffered_tokens=max_buffered_tokens)
    locator = Locator(pool, clock)
    dispatch = Dispatch(placement, admission, locator, limits, clock=clock, ledger=cluster.ledger)
    tokenizer: Any = ByteTokenizer()
    server = InferenceServer(config)
    watching = asyncio.create_task(pool.run())
    with TextWorkers(tokenizer, max_prompt_bytes=config.max_prompt_bytes, max_tokens=MODEL.context_length) as text:
        server.backend = Backend(dispatch, locator, MODEL, text, metrics, clock)
        async with serving(server) as address, channel(address) as client:
            router = RunningRouter(
                inference_pb2_grpc.InferenceServiceStub(client), admission, pool, server, cluster, metrics, address
            )
            if wait:
                await until(lambda: len(pool.usable_decode()) == len(cluster.decode) > 0, "sessions")
            try:
                yield router
            finally:
                watching.cancel()
                await asyncio.wait({watching})
                if not watching.cancelled() and (error := watching.exception()):
                    raise error


@contextlib.asynccontextmanager
async def serving(server: InferenceServer) -> AsyncIterator[str]:
    grpc_server = create_server(max_receive_bytes=PUBLIC_RECEIVE_BYTES)
    server.register(grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await grpc_server.stop(0)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert condition(), what


async def rest(call: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """What a call that was read by hand still has to say."""
    while isinstance(response := await call.read(), inference_pb2.GenerateResponse):
        yield response


async def read_to_the_end(call: Any) -> None:
    """Raises the typed error the call ends with."""
    try:
        async for _ in rest(call):
            pass
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


def ask(prompt: str = "Hello", **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=prompt, sampling=types_pb2.SamplingParams(**sampling))


def no_room(reserve: decode_pb2.Reserve) -> IsthmusError:
    return NoFreeBlocks("no free blocks")


def _record(fake: FakeDecode | FakePrefill, role: str) -> WorkerRecord:
    total = fake.total_blocks if isinstance(fake, FakeDecode) else 1000
    return WorkerRecord(
        incarnation=fake.incarnation,
        role=role,
        name=fake.name,
        pid=1,
        grpc_address=fake.address,
        zmq_endpoint="tcp://127.0.0.1:1" if role == "decode" else None,
        http_address="127.0.0.1:2",
        layout=LAYOUT,
        numerics_digest=NUMERICS,
        numerics_ingredients={},
        model_digest=MODEL_DIGEST,
        load=WorkerLoad(BlockCounts(total=total, free=total, cached=0, referenced=0)),
        serving=True,
        state="idle",
        seconds_since_progress=0.0,
    )
