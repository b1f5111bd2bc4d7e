"""The gRPC face of a decode worker: the session of each router, and Find."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from decode_service import messages
from decode_service.session import RouterSession
from decode_service.stream import AttachKey
from decode_service.streams import Streams
from isthmus.admin import Identity
from isthmus.convert import extent_to_proto, finish_reason_from_proto, layout_to_proto, request_from_proto
from isthmus.errors import InvalidRequest, IsthmusError, NotYet, WorkersUnavailable
from isthmus.log import get_logger
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, decode_pb2_grpc, types_pb2

HELLO_TIMEOUT_S = 5.0
log = get_logger("decode.server")


class DecodeServer(decode_pb2_grpc.DecodeServiceServicer):
    """Answers from the first moment; until `open` it has no streams and says so."""

    def __init__(self, identity: Identity):
        self._identity = identity
        self._opened: Streams | None = None

    def open(self, streams: Streams) -> None:
        self._opened = streams

    @property
    def _streams(self) -> Streams:
        if self._opened is None:
            raise WorkersUnavailable("this decode worker is starting", retry_after_s=0.2)
        return self._opened

    async def Session(  # noqa: N802 - the proto's name
        self,
        request_iterator: AsyncIterator[decode_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[decode_pb2.SessionRequest, decode_pb2.SessionResponse],
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        """Yields what the worker has to say; ends when the router goes away, which ends its streams."""
        streams = self._streams
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
            streams.end_session(session)
            log.info("session_ended", router=session.router_incarnation)

    async def Find(  # noqa: N802
        self,
        request: decode_pb2.FindRequest,
        context: grpc.aio.ServicerContext[decode_pb2.FindRequest, decode_pb2.FindResponse],
    ) -> decode_pb2.FindResponse:
        stream = self._streams.get(request.request_id)
        return decode_pb2.FindResponse(found=stream is not None, next_index=len(stream.token_ids) if stream else 0)

    async def _greet(self, messages_in: AsyncIterator[decode_pb2.SessionRequest]) -> RouterSession:
        first = await asyncio.wait_for(anext(messages_in), HELLO_TIMEOUT_S)
        if first.WhichOneof("message") != "hello":
            raise InvalidRequest.of("message", first.WhichOneof("message"), "hello as the first message of a session")
        session = RouterSession(first.hello.router_incarnation)
        named = [cursor.request_id for cursor in first.hello.streams]
        hello = decode_pb2.DecodeHello(
            incarnation=self._identity.incarnation,
            layout=layout_to_proto(self._streams.engine.layout),
            numerics_digest=self._streams.engine.numerics.digest,
            unknown_streams=[request_id for request_id in named if self._streams.get(request_id) is None],
        )
        session.send(decode_pb2.SessionResponse(hello=hello))
        log.info("session_opened", router=session.router_incarnation)
        return session

    async def _read(self, session: RouterSession, messages_in: AsyncIterator[decode_pb2.SessionRequest]) -> None:
        try:
            async for message in messages_in:
                self._follow(message, session)
        except grpc.aio.UsageError:
            pass
        finally:
            session.close()

    def _follow(self, message: decode_pb2.SessionRequest, session: RouterSession) -> None:
        kind = message.WhichOneof("message")
        request_id = ""
        try:
            match kind:
                case "reserve":
                    request_id = message.reserve.request.request_id
                    session.send(self._reserve(message.reserve, session))
                case "cancel":
                    self._cancel(message.cancel)
                case "release":
                    request_id = message.release.request_id
                    self._streams.cancel(request_id, _attach(message.release.attach), FinishReason.CANCELLED)
                case "hello":
                    raise InvalidRequest.of("message", "hello", "one hello, as the first message of a session")
                case None:
                    raise InvalidRequest.of("message", None, "reserve, cancel, release")
                case _:
                    request_id = getattr(message, kind).request_id
                    raise NotYet(f"{kind} is not served yet")
        except IsthmusError as error:
            session.send(messages.refused(request_id, error))

    def _reserve(self, reserve: decode_pb2.Reserve, session: RouterSession) -> decode_pb2.SessionResponse:
        if reserve.on_disconnect == types_pb2.ON_DISCONNECT_RETAIN:
            raise NotYet("on_disconnect: retain is not served yet")
        if reserve.request.emitted_token_ids:
            raise NotYet("emitted_token_ids is not served yet")
        request, attach = request_from_proto(reserve.request), _attach(reserve.attach)
        stream = self._streams.reserve(request, attach, session, reserve.fill_timeout_ms / 1000 or None)
        reserved = decode_pb2.Reserved(
            request_id=stream.request_id,
            transfer_id=stream.transfer_id,
            attempt=stream.attempt,
            zmq_endpoint=self._identity.zmq_endpoint,
            incarnation=self._identity.incarnation,
            layout_fingerprint=self._streams.engine.layout.fingerprint,
            num_cached_tokens=stream.num_cached_tokens,
            missing=[extent_to_proto(extent) for extent in stream.missing],
        )
        return decode_pb2.SessionResponse(reserved=reserved)

    def _cancel(self, cancel: decode_pb2.CancelStream) -> None:
        why = finish_reason_from_proto(cancel.finish_reason) or FinishReason.CANCELLED
        self._streams.cancel(cancel.request_id, _attach(cancel.attach), why)


def _attach(message: decode_pb2.AttachId) -> AttachKey:
    return AttachKey(message.router_incarnation, message.counter)
