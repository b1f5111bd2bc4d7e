"""One session with one decode worker: the bidirectional stream that carries every request this router has there."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import grpc.aio

from isthmus.clock import Clock
from isthmus.convert import finish_reason_to_proto
from isthmus.errors import TransferIncomplete, WorkerLost, WorkersUnavailable
from isthmus.log import get_logger
from isthmus.rpc_errors import typed_error
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, decode_pb2_grpc
from router.inbox import Failed, Inbox
from router.policy import NO_NEW_WORK_S

MAX_OUTGOING = 4096  # messages to a worker that does not read; beyond it the session is given up
HELLO_TIMEOUT_S = 2.0
RESERVE_TIMEOUT_S = 2.0
SETTLE_TIMEOUT_S = 1.0
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 1.0
SessionCall = grpc.aio.StreamStreamCall[decode_pb2.SessionRequest, decode_pb2.SessionResponse]
_log = get_logger("router.session")


@dataclass(frozen=True, slots=True)
class SessionPeer:
    """Both ends of a session."""

    router_incarnation: str
    decode_incarnation: str
    decode_name: str


@dataclass(eq=False, slots=True)
class DecodeStream:
    """One reservation. Its messages reach `inbox` until `close`."""

    session: "Session"
    request_id: str
    attempt: int
    inbox: Inbox
    answer: asyncio.Future[decode_pb2.Reserved]
    is_claimed: bool = False  # decode has reported a token
    is_cancelled: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # nothing of it is left on the worker

    @property
    def reserved(self) -> decode_pb2.Reserved:
        return self.answer.result()

    def end(self, finish_reason: FinishReason) -> None:
        """Tells the worker to free everything, once, unless it has done so. Never waits."""
        if not self.ended.is_set() and not self.is_cancelled:
            self.is_cancelled = True
            self.session.send_cancel(self, finish_reason)

    def let_end(self) -> None:
        """The worker finds the same end by itself and frees everything then."""
        self.ended.set()

    async def settle(self) -> None:
        """After `end`: waits, within a bound, for the worker's word that nothing is left: it may be asked again."""
        try:
            async with asyncio.timeout(SETTLE_TIMEOUT_S):
                await self.ended.wait()
        except TimeoutError:
            _log.warning("session.unsettled", request_id=self.request_id, attempt=self.attempt)

    def close(self) -> None:
        self.session.forget(self)


def _new_future() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False, slots=True)
class Session:
    """Event loop only. `run` connects and reconnects until cancelled; a lost connection ends every stream of it."""

    stub: "decode_pb2_grpc.DecodeServiceAsyncStub"
    peer: SessionPeer
    clock: Clock
    on_change: Callable[[], None]
    hello: decode_pb2.DecodeHello | None = field(default=None, init=False)  # while the session is alive
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

    def attach_id(self, attempt: int) -> decode_pb2.AttachId:
        """The attempt is the counter: a later attempt's messages outrank an earlier one's."""
        return decode_pb2.AttachId(router_incarnation=self.peer.router_incarnation, counter=attempt)

    async def run(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            problem = "closed by the worker"
            try:
                call = await self._connect()
                backoff_s = FIRST_BACKOFF_S
                await self._converse(call)
            except grpc.aio.AioRpcError as error:
                problem = error.details() or error.code().name
            except (TimeoutError, WorkerLost) as error:
                problem = str(error) or "no hello in time"
            except Exception as error:  # noqa: BLE001 - the session's root: one worker's nonsense must not end the others'
                _log.exception("session.failed", error, worker=self.peer.decode_name)
            finally:
                self.abandon("the session with the decode worker was lost")
            _log.debug("session.lost", worker=self.peer.decode_name, problem=problem, retry_s=backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, LAST_BACKOFF_S)

    async def reserve(self, reserve: decode_pb2.Reserve, inbox: Inbox, *, timeout_s: float) -> DecodeStream:
        """Asks for room. Raises the worker's refusal as its typed error, WorkersUnavailable when it does not answer."""
        if not self.is_alive:
            raise WorkersUnavailable("no session with the decode worker")
        request_id = reserve.request.request_id
        assert request_id not in self._streams, "one reservation of a request at a time on one worker"
        answer = asyncio.get_running_loop().create_future()
        stream = DecodeStream(self, request_id, reserve.attach.counter, inbox, answer)
        self._streams[request_id] = stream
        try:
            self._send(decode_pb2.SessionRequest(reserve=reserve))
            async with asyncio.timeout(min(timeout_s, RESERVE_TIMEOUT_S)):
                await answer
        except BaseException as error:  # also a cancellation: nobody would free what the worker may have set aside
            stream.end(FinishReason.CANCELLED)
            self.forget(stream)
            if isinstance(error, TimeoutError):
                raise WorkersUnavailable("the decode worker did not answer a reservation in time") from error
            raise
        return stream

    def send_cancel(self, stream: DecodeStream, finish_reason: FinishReason) -> None:
        if self._streams.get(stream.request_id) is not stream or not self.is_alive:
            return
        cancel = decode_pb2.CancelStream(
            request_id=stream.request_id,
            attach=self.attach_id(stream.attempt),
            finish_reason=finish_reason_to_proto(finish_reason),
        )
        self._send(decode_pb2.SessionRequest(cancel=cancel))

    def forget(self, stream: DecodeStream) -> None:
        """No message of this stream is delivered any more."""
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
        self.on_change()

    def abandon(self, why: str) -> None:
        """Gives the connection up; every stream is told at once, and the worker frees what it held for this router."""
        if not self._given_up.done():
            self._given_up.set_result(None)
        was_alive, self.hello = self.is_alive, None
        for stream in [stream for stream in self._streams.values() if not stream.ended.is_set()]:
            self._finish(stream, Failed("decode", WorkerLost(why)))
        if was_alive:
            _log.info("session.given_up", worker=self.peer.decode_name, why=why)
            self.on_change()

    async def _connect(self) -> SessionCall:
        call: SessionCall = self.stub.Session()
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            router_hello = decode_pb2.RouterHello(router_incarnation=self.peer.router_incarnation)
            await call.write(decode_pb2.SessionRequest(hello=router_hello))
            first = await call.read()
        if not isinstance(first, decode_pb2.SessionResponse) or first.WhichOneof("message") != "hello":
            raise WorkerLost("the decode worker did not say hello")
        if first.hello.incarnation != self.peer.decode_incarnation:
            raise WorkerLost("another incarnation answers at the decode worker's address")
        self._outgoing = asyncio.Queue(MAX_OUTGOING)
        self._given_up = _new_future()
        self._heard_at = self.clock.now()
        self.hello = first.hello
        _log.info("session.alive", worker=self.peer.decode_name)
        self.on_change()
        return call

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
                    if stream := self._streams.get(tokens.request_id):
                        stream.is_claimed = True
                        stream.inbox.put(tokens)
            case "reserved":
                stream = self._streams.get(message.reserved.request_id)
                if stream and not stream.answer.done():
                    stream.answer.set_result(message.reserved)
            case "refused":
                refused = message.refused
                retry_after_s = refused.retry_after_ms / 1000 or None
                error = typed_error(refused.reason, refused.detail, retry_after_s=retry_after_s)
                self._finish(self._streams.get(refused.request_id), Failed("decode", error))
            case "ended":
                self._finish(self._streams.get(message.ended.request_id), message.ended)
            case "transfer_failed":
                failed = message.transfer_failed
                error = TransferIncomplete(f"the prompt's blocks did not arrive: {failed.reason}")
                self._finish(self._streams.get(failed.request_id), Failed("transfer", error))
            case other:
                _log.warning("session.unexpected", worker=self.peer.decode_name, message=other)

    def _finish(self, stream: DecodeStream | None, event: decode_pb2.StreamEnded | Failed) -> None:
        """The worker holds nothing of the stream any more: as its answer when it was still asked, else as an event."""
        if stream is None:
            return
        stream.ended.set()
        stream.is_claimed = False
        if stream.answer.done():
            stream.inbox.put(event)
        else:
            ended = WorkersUnavailable("the stream ended before it was reserved")
            stream.answer.set_exception(event.error if isinstance(event, Failed) else ended)
