"""One router's session: a bounded queue of messages out. A router that does not read loses the session."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import Message

from isthmus.v1 import decode_pb2

MAX_QUEUED_MESSAGES = 4096  # a message a step: minutes of steps for a router that stopped reading
_FIELDS = {f.message_type.name: f.name for f in decode_pb2.SessionResponse.DESCRIPTOR.fields if f.message_type}


class RouterSession:
    """Event loop only. `lost` is set when the queue overflowed or the call ended; nothing is sent afterwards."""

    def __init__(self, router_incarnation: str):
        self.router_incarnation = router_incarnation
        self._queue: asyncio.Queue[decode_pb2.SessionResponse | None] = asyncio.Queue(MAX_QUEUED_MESSAGES + 1)
        self._is_open = True

    def send(self, message: Message) -> None:
        """`message` is one of those that a SessionResponse carries."""
        if not self._is_open:
            return
        if self._queue.qsize() >= MAX_QUEUED_MESSAGES:
            self.close()
            return
        content: dict[str, Any] = {_FIELDS[message.DESCRIPTOR.name]: message}
        self._queue.put_nowait(decode_pb2.SessionResponse(**content))

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
