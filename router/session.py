"""One session with one decode worker: the bidirectional stream that carries every request this router has there."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio
from google.protobuf.message import Message

from isthmus.clock import Clock
from isthmus.convert import finish_reason_to_proto
from isthmus.errors import AttachedElsewhere, WorkerLost, WorkersUnavailable
from isthmus.log import get_logger
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, decode_pb2_grpc
from router.decode_stream import DecodeStream
from router.inbox import Failed, Source
from router.policy import NO_NEW_WORK_S

MAX_OUTGOING = 4096  # messages to a worker that does not read; beyond it the session is given up
HELLO_TIMEOUT_S = 2.0
BLIP_TIMEOUT_S = 0.5  # to come back to the streams of a lost connection: a worker keeps them a little longer
ANSWER_TIMEOUT_S = 2.0  # to a reservation, an attach or a rearm
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 1.0
SessionCall = grpc.aio.StreamStreamCall[decode_pb2.SessionRequest, decode_pb2.SessionResponse]
_log = get_logger("router.session")


@dataclass(frozen=True, slots=True)
class SessionPeer:
    """Both ends of a session."""

    router_incarnation: str
    decode_incarnation: str
    decode_name: str


def _new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False, slots=True)
class Session:
    """Event loop only. `run` connects and reconnects until cancelled.

    A connection that breaks is tried once more at once: the same incarnation goes on with the streams where this router
    heard them last. Otherwise they are lost here, and the next hello tells the worker so by not naming them.
    """

    stub: "decode_pb2_grpc.DecodeServiceAsyncStub"
    peer: SessionPeer
    clock: Clock
    on_change: Callable[[], None]
    hello: decode_pb2.DecodeHello | None = field(default=None, init=False)  # while the session is alive
    is_leaving: bool = field(default=False, init=False)  # the worker drains
    has_met: bool = field(default=False, init=False)  # the first try to connect is over
    _streams: dict[str, DecodeStream] = field(default_factory=dict[str, DecodeStream], init=False)
    _heard_at: float = field(init=False)  # of the present connection, as are these:
    _outgoing: asyncio.Queue[decode_pb2.SessionRequest] = field(init=False)
    _given_up: asyncio.Future[None] = field(default_factory=_new_future, init=False)

    @property
    def is_alive(self) -> bool:
        return self.hello is not None

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def is_silent(self) -> bool:
        """Running streams here and no message for a while: the worker's step hangs, whatever its heartbeats say."""
        is_owed = any(stream.is_claimed for stream in self._streams.values())
        return is_owed and self.clock.now() - self._heard_at >= NO_NEW_WORK_S

    def attach_id(self, counter: int) -> decode_pb2.AttachId:
        """A later attempt's messages outrank an earlier one's."""
        return decode_pb2.AttachId(router_incarnation=self.peer.router_incarnation, counter=counter)

    async def run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        try:
            while True:
                problem = await self._connect_once()
                self.has_met = True
                if self._lose_connection(problem):
                    backoff_s = FIRST_BACKOFF_S
                else:
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)
        finally:
            self.abandon("the session was closed")

    async def _connect_once(self) -> str:
        """One connection's life; why it ended."""
        try:
            await self._converse(await self._connect())
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        except (TimeoutError, WorkerLost) as error:
            return str(error) or "no hello in time"
        except Exception as error:  # noqa: BLE001 - the session's root: one worker's nonsense must not end the others'
            _log.exception("session.failed", error, worker=self.peer.decode_name)
            return type(error).__name__
        return "closed by the worker"

    async def reserve(self, reserve: decode_pb2.Reserve, source: Source, *, timeout_s: float) -> DecodeStream:
        """Asks for room. Raises the worker's refusal as its typed error, WorkersUnavailable when it does not answer."""
        request_id = reserve.request.request_id
        message = decode_pb2.SessionRequest(reserve=reserve)
        return await self._ask(message, request_id, reserve.attach.counter, source, timeout_s)

    async def attach(self, request_id: str, next_index: int, source: Source) -> DecodeStream:
        """Takes over a stream, whoever has it. Raises StreamGone, IndexOutOfRange, WorkersUnavailable."""
        attach = decode_pb2.Attach(request_id=request_id, attach=self.attach_id(0), next_index=next_index)
        message = decode_pb2.SessionRequest(attach=attach)
        stream = await self._ask(message, request_id, 0, source, ANSWER_TIMEOUT_S)
        stream.next_index = next_index
        return stream

    async def rearm(self, stream: DecodeStream, attempt: int, fill_timeout_s: float) -> decode_pb2.Rearmed:
        """Fences the transfer's writers so far; says what is missing. Raises StaleOwner when nothing may fill it."""
        stream.rearmed = asyncio.get_running_loop().create_future()
        rearm = decode_pb2.Rearm(
            request_id=stream.request_id,
            transfer_id=stream.reserved.transfer_id,
            attempt=attempt,
            attach=self.attach_id(stream.counter),
            fill_timeout_ms=int(fill_timeout_s * 1000),
        )
        self._send(decode_pb2.SessionRequest(rearm=rearm))
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await stream.rearmed
        except TimeoutError as error:
            raise WorkerLost("the decode worker did not answer a rearm in time") from error
        finally:
            stream.rearmed = None

    def send_move(self, stream: DecodeStream, target: decode_pb2.Reserved) -> None:
        """The worker's Moved follows."""
        attach = self.attach_id(stream.counter)
        move = decode_pb2.Move(request_id=stream.request_id, attach=attach, target=target)
        self._send(decode_pb2.SessionRequest(move=move))

    def send_cancel(self, stream: DecodeStream, finish_reason: FinishReason) -> None:
        if self._streams.get(stream.request_id) is not stream or not self.is_alive:
            return
        cancel = decode_pb2.CancelStream(
            request_id=stream.request_id,
            attach=self.attach_id(stream.counter),
            finish_reason=finish_reason_to_proto(finish_reason),
        )
        self._send(decode_pb2.SessionRequest(cancel=cancel))

    def forget(self, stream: DecodeStream) -> None:
        """No message of this stream is delivered any more."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
        self.on_change()

    def abandon(self, why: str) -> None:
        """Gives the connection up; every stream is told at once, and the next hello does not name them."""
        if not self._given_up.done():
            self._given_up.set_result(None)
        was_alive, self.hello = self.is_alive, None
        lost = [stream for stream in self._streams.values() if not stream.is_ended]
        for stream in lost:
            stream.finish(Failed(WorkerLost(why), in_company=len(lost) > 1))
        if was_alive:
            _log.info("session.given_up", worker=self.peer.decode_name, why=why)
            self.on_change()

    async def _ask(
        self, message: decode_pb2.SessionRequest, request_id: str, counter: int, source: Source, timeout_s: float
    ) -> DecodeStream:
        if not self.is_alive:
            raise WorkersUnavailable("no session with the decode worker")
        if (other := self._streams.get(request_id)) is not None:  # resumed at the router that still has it
            other.let_go()
            other.source.put(Failed(AttachedElsewhere("another call took the stream over")))
        answer = asyncio.get_running_loop().create_future()
        stream = DecodeStream(self, request_id, counter, source, answer)
        self._streams[request_id] = stream
        try:
            self._send(message)
            async with asyncio.timeout(min(timeout_s, ANSWER_TIMEOUT_S)):
                await answer
        except BaseException as error:  # also a cancellation: nobody would free what the worker may have set aside
            stream.end(FinishReason.CANCELLED)
            self.forget(stream)  # its source may be asked for elsewhere
            if isinstance(error, TimeoutError):
                raise WorkersUnavailable("the decode worker did not answer in time") from error
            raise
        return stream

    async def _connect(self) -> SessionCall:
        """Names the streams to go on with; what the worker does not know of them is lost."""
        call: SessionCall = self.stub.Session()
        kept = [decode_pb2.StreamCursor(request_id=s.request_id, next_index=s.next_index) for s in self._kept()]
        async with asyncio.timeout(BLIP_TIMEOUT_S if kept else HELLO_TIMEOUT_S):
            router_hello = decode_pb2.RouterHello(router_incarnation=self.peer.router_incarnation, streams=kept)
            await call.write(decode_pb2.SessionRequest(hello=router_hello))
            first = await call.read()
        if not isinstance(first, decode_pb2.SessionResponse) or first.WhichOneof("message") != "hello":
            raise WorkerLost("the decode worker did not say hello")
        if first.hello.incarnation != self.peer.decode_incarnation:
            raise WorkerLost("another incarnation answers at the decode worker's address")
        self._outgoing = asyncio.Queue(MAX_OUTGOING)
        self._given_up = _new_future()
        self._heard_at = self.clock.now()
        self.hello, self.has_met = first.hello, True
        for request_id in first.hello.unknown_streams:
            if stream := self._streams.get(request_id):
                stream.finish(Failed(WorkerLost("the decode worker no longer has the stream")))
        _log.info("session.alive", worker=self.peer.decode_name, num_streams=len(kept))
        self.on_change()
        return call

    def _kept(self) -> list[DecodeStream]:
        return [s for s in self._streams.values() if not (s.is_ended or s.is_cancelled)]

    def _lose_connection(self, problem: str) -> bool:
        """After a conversation broke off by itself, True: its streams wait for the connection to be made again."""
        is_blip = self.is_alive and not self.is_silent  # a peer that froze will not shake hands either
        if is_blip:
            self.hello = None
            for stream in [s for s in self._streams.values() if not s.answer.done() or s.rearmed is not None]:
                stream.refuse(WorkersUnavailable("the session broke off"))  # whether it was heard, nobody knows
        else:
            self.abandon(f"the decode worker was lost: {problem}")
        _log.debug("session.lost", worker=self.peer.decode_name, problem=problem, is_blip=is_blip)
        self.on_change()
        return is_blip

    async def _converse(self, call: SessionCall) -> None:
        """Reads and writes until either fails or the session is given up."""
        reader = asyncio.create_task(self._read_all(call), name="session-reader")
        writer = asyncio.create_task(self._write_all(call), name="session-writer")
        try:
            await asyncio.wait({reader, writer, self._given_up}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Cancelling the tasks ends the call; cancelling the call would look like their own cancellation.
            reader.cancel()
            writer.cancel()
            # No task group: it drops a cancellation that comes while one of its tasks fails.
            outcomes = await asyncio.gather(reader, writer, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _read_all(self, call: SessionCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while isinstance(message := await call.read(), decode_pb2.SessionResponse):
                self._heard_at = self.clock.now()
                self._route(message)

    async def _write_all(self, call: SessionCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await self._outgoing.get())

    def _send(self, message: decode_pb2.SessionRequest) -> None:
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.abandon("the decode worker does not read its session")

    def _route(self, message: decode_pb2.SessionResponse) -> None:
        match message.WhichOneof("message"):
            case "step":
                for tokens in message.step.streams:
                    stream = self._streams.get(tokens.request_id)
                    if stream is not None and stream.counter == tokens.counter:
                        stream.hear(tokens)
            case "leaving":
                self.is_leaving = True
                for stream in self._streams.values():
                    if stream.answer.done():  # else it may be placed elsewhere yet
                        stream.source.put(message.leaving)
                self.on_change()
            case "attached":
                self._tell(message.attached.request.request_id, message.attached)
            case "reserved" | "refused" | "ended" | "transfer_failed" | "rearmed" | "detached" | "moved" as kind:
                said = getattr(message, kind)
                self._tell(said.request_id, said)
            case other:
                _log.warning("session.unexpected", worker=self.peer.decode_name, message=other)

    def _tell(self, request_id: str, said: Message) -> None:
        """What is said of an earlier reservation of the request is passed over."""
        stream = self._streams.get(request_id)
        if stream is not None and getattr(said, "counter", stream.counter) == stream.counter:
            stream.take(said)
