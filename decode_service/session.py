"""One router's session: a bounded queue of messages out. A router that does not read loses the session."""

import asyncio
from collections.abc import AsyncIterator

from isthmus.v1 import decode_pb2

MAX_QUEUED_MESSAGES = 4096  # a message a step: minutes of steps for a router that stopped reading


class RouterSession:
    """Event loop only. `lost` is set when the queue overflowed or the call ended; nothing is sent afterwards."""

    def __init__(self, router_incarnation: str):
        self.router_incarnation = router_incarnation
        self._queue: asyncio.Queue[decode_pb2.SessionResponse | None] = asyncio.Queue(MAX_QUEUED_MESSAGES + 1)
        self._is_open = True

    def send(self, message: decode_pb2.SessionResponse) -> None:
        if not self._is_open:
            return
        if self._queue.qsize() >= MAX_QUEUED_MESSAGES:
            self.close()
            return
        self._queue.put_nowait(message)

    def close(self) -> None:
        """Ends `outgoing` after what is queued."""
        if self._is_open:
            self._is_open = False
            self._queue.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[decode_pb2.SessionResponse]:
        while (message := await self._queue.get()) is not None:
            yield message


NOBODY = RouterSession("")  # where messages of a stream go that nobody wants to hear of
NOBODY.close()
