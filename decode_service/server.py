"""The gRPC driver of a decode worker: one session for each router, and Find. It decides nothing."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from decode_service.core import DecodeCore
from decode_service.session import RouterSession
from isthmus.clock import Clock
from isthmus.errors import RequestCancelled, WorkersUnavailable
from isthmus.log import get_logger
from isthmus.process.serving import until_none_left
from isthmus.v1 import decode_pb2, decode_pb2_grpc

HELLO_TIMEOUT_S = 5.0
log = get_logger("decode.server")
Context = grpc.aio.ServicerContext[Any, Any]
SessionMessages = AsyncIterator[decode_pb2.SessionRequest]


class DecodeServer(decode_pb2_grpc.DecodeServiceServicer):
    """Answers from the first moment; until `open` it has no streams and says so. Event loop only."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._opened: DecodeCore | None = None

    def open(self, core: DecodeCore) -> None:
        self._opened = core

    async def drain(self, timeout_s: float) -> int:
        """Refuses new streams and waits until the others are moved or have ended; how many are left."""
        if self._opened is None:
            return 0
        self._opened.attachments.begin_drain()
        return await until_none_left(self._opened.streams.table.__len__, timeout_s)

    async def Session(  # noqa: N802 - the proto's name
        self, request_iterator: SessionMessages, context: Context
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        """Yields what the worker has to say; when it ends the router's streams wait for another session."""
        core = self._core
        messages_in = aiter(request_iterator)
        hello = await asyncio.wait_for(anext(messages_in, None), HELLO_TIMEOUT_S)
        if hello is None:
            raise RequestCancelled("the session was closed before its hello")
        has_message = asyncio.Event()
        session = RouterSession(hello.hello.router_incarnation, has_message.set)
        core.requests.greet(hello, session, self._clock.now())
        log.info("session_opened", router=session.router_incarnation)
        reader = asyncio.create_task(
            self._read(core, session, messages_in), name=f"session-{session.router_incarnation}"
        )
        try:
            async for message in _outgoing(session, has_message):
                yield message
        finally:
            session.close()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            core.attachments.lost(session, self._clock.now())
            log.info("session_ended", router=session.router_incarnation)

    async def Find(  # noqa: N802
        self, request: decode_pb2.FindRequest, context: Context
    ) -> decode_pb2.FindResponse:
        return self._core.requests.find(request)

    @property
    def _core(self) -> DecodeCore:
        if self._opened is None:
            raise WorkersUnavailable("this decode worker is starting", retry_after_s=0.2)
        return self._opened

    async def _read(self, core: DecodeCore, session: RouterSession, messages_in: SessionMessages) -> None:
        try:
            async for message in messages_in:
                core.requests.follow(message, session, self._clock.now())
        except grpc.aio.UsageError:
            pass
        finally:
            session.close()


async def _outgoing(session: RouterSession, has_message: asyncio.Event) -> AsyncIterator[decode_pb2.SessionResponse]:
    """Until the session is over and everything was taken."""
    while True:
        message = session.next_message()
        if message is not None:
            yield message
        elif session.is_over:
            return
        else:
            has_message.clear()
            await has_message.wait()
