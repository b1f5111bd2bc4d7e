"""The gRPC face of a decode worker: the session of each router, and Find."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from decode_service import messages
from decode_service.attachment import Attachments
from decode_service.moving import Mover
from decode_service.session import RouterSession
from decode_service.stream import AttachKey, Phase
from decode_service.streams import Streams, Terms
from isthmus import convert
from isthmus.errors import InvalidRequest, IsthmusError, RequestCancelled, StaleOwner, WorkersUnavailable
from isthmus.log import get_logger
from isthmus.process.admin import Identity
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, decode_pb2_grpc, types_pb2

HELLO_TIMEOUT_S = 5.0
MAX_RETENTION_S = 120
log = get_logger("decode.server")
Context = grpc.aio.ServicerContext[Any, Any]
SessionRequests = AsyncIterator[decode_pb2.SessionRequest]


class DecodeServer(decode_pb2_grpc.DecodeServiceServicer):
    """Answers from the first moment; until `open` it has no streams and says so."""

    def __init__(self, identity: Identity):
        self._identity = identity
        self._opened: Attachments | None = None
        self._mover: Mover | None = None

    def open(self, attachments: Attachments, mover: Mover) -> None:
        self._opened, self._mover = attachments, mover

    async def drain(self, timeout_s: float) -> int:
        """Refuses new streams and waits until the others are moved or have ended; how many are left."""
        return 0 if self._opened is None else await self._opened.drain(timeout_s)

    @property
    def _attachments(self) -> Attachments:
        if self._opened is None:
            raise WorkersUnavailable("this decode worker is starting", retry_after_s=0.2)
        return self._opened

    @property
    def _streams(self) -> Streams:
        return self._attachments.streams

    async def Session(  # noqa: N802 - the proto's name
        self, request_iterator: SessionRequests, context: Context
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        """Yields what the worker has to say; when it ends the router's streams wait for another session."""
        attachments = self._attachments
        messages_in = aiter(request_iterator)
        session = await self._greet(messages_in)
        reader = asyncio.create_task(self._read(session, messages_in), name=f"session-{session.router_incarnation}")
        try:
            async for message in session.outgoing():
                yield message
        finally:
            session.close()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            attachments.lost(session)
            log.info("session_ended", router=session.router_incarnation)

    async def Find(  # noqa: N802
        self, request: decode_pb2.FindRequest, context: Context
    ) -> decode_pb2.FindResponse:
        stream = self._streams.get(request.request_id)
        return decode_pb2.FindResponse(found=stream is not None, next_index=stream.num_known if stream else 0)

    async def _greet(self, messages_in: SessionRequests) -> RouterSession:
        first = await asyncio.wait_for(anext(messages_in, None), HELLO_TIMEOUT_S)
        if first is None:
            raise RequestCancelled("the session was closed before its hello")
        if first.WhichOneof("message") != "hello":
            raise InvalidRequest.of("message", first.WhichOneof("message"), "hello as the first message of a session")
        session = RouterSession(first.hello.router_incarnation)
        hello = decode_pb2.DecodeHello(
            incarnation=self._identity.incarnation,
            layout=convert.layout_to_proto(self._streams.engine.layout),
            numerics_digest=self._streams.engine.numerics_digest,
        )
        next_index = {cursor.request_id: cursor.next_index for cursor in first.hello.streams}
        self._attachments.open(session, next_index, hello)
        log.info("session_opened", router=session.router_incarnation)
        return session

    async def _read(self, session: RouterSession, messages_in: SessionRequests) -> None:
        try:
            async for message in messages_in:
                self._follow(message, session)
        except grpc.aio.UsageError:
            pass
        finally:
            session.close()

    def _follow(self, message: decode_pb2.SessionRequest, session: RouterSession) -> None:
        request_id, counter = "", 0
        try:
            match message.WhichOneof("message"):
                case "reserve":
                    request_id, counter = message.reserve.request.request_id, message.reserve.attach.counter
                    self._reserve(message.reserve, session)
                case "rearm":
                    request_id, counter = message.rearm.request_id, message.rearm.attach.counter
                    self._rearm(message.rearm, session)
                case "attach":
                    request_id = message.attach.request_id
                    self._attachments.attach(request_id, message.attach.next_index, session)
                case "cancel":
                    why = convert.finish_reason_from_proto(message.cancel.finish_reason) or FinishReason.CANCELLED
                    self._attachments.cancel(message.cancel.request_id, _key(message.cancel.attach), why)
                case "release":
                    self._attachments.release(message.release.request_id, _key(message.release.attach))
                case "move":
                    self._move(message.move, session)
                case other:
                    raise InvalidRequest.of("message", other, "reserve, rearm, attach, cancel, release, move")
        except IsthmusError as error:
            session.send(messages.refused(request_id, counter, error))

    def _reserve(self, reserve: decode_pb2.Reserve, session: RouterSession) -> None:
        is_retained = reserve.on_disconnect == types_pb2.ON_DISCONNECT_RETAIN
        terms = Terms(
            fill_timeout_s=reserve.fill_timeout_ms / 1000 or None,
            retention_s=min(reserve.retention_s, MAX_RETENTION_S) if is_retained else None,
            moves=reserve.moves,
        )
        request = convert.request_from_proto(reserve.request)
        stream = self._streams.reserve(request, _key(reserve.attach), session, terms)
        reserved = decode_pb2.Reserved(
            request_id=stream.request_id,
            counter=stream.attach.counter,
            transfer_id=stream.transfer_id,
            attempt=stream.attempt,
            zmq_endpoint=self._identity.zmq_endpoint,
            incarnation=self._identity.incarnation,
            layout_fingerprint=self._streams.engine.layout.fingerprint,
            num_cached_tokens=stream.num_cached_tokens,
            missing=map(convert.extent_to_proto, stream.missing),
        )
        session.send(reserved)

    def _rearm(self, rearm: decode_pb2.Rearm, session: RouterSession) -> None:
        stream = self._streams.get(rearm.request_id)
        if stream is None or stream.phase is not Phase.FILLING or stream.transfer_id != rearm.transfer_id:
            raise StaleOwner("the transfer is not being filled")
        if self._attachments.held(rearm.request_id, _key(rearm.attach)):
            self._streams.rearm(stream, rearm.attempt, rearm.fill_timeout_ms / 1000 or None)
            session.send(messages.rearmed(stream))

    def _move(self, move: decode_pb2.Move, session: RouterSession) -> None:
        if self._streams.get(move.request_id) is None:
            session.send(messages.moved(move.request_id, move.target.transfer_id, "it is not here"))
        elif self._mover and (stream := self._attachments.held(move.request_id, _key(move.attach))):
            self._mover.move(stream, convert.target_from_proto(move.target))


def _key(message: decode_pb2.AttachId) -> AttachKey:
    return AttachKey(message.router_incarnation, message.counter)
