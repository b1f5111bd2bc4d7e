"""One router's session as a bounded queue of messages to that router. A router that does not read loses the session."""

from collections import deque
from collections.abc import Callable
from typing import Any

from decode_service.sink import SessionMessage
from isthmus.v1 import decode_pb2

MAX_QUEUED_MESSAGES = 4096  # a message a step: minutes of steps for a router that stopped reading
_FIELD_OF = {
    field.message_type.name: field.name
    for field in decode_pb2.SessionResponse.DESCRIPTOR.fields
    if field.message_type is not None
}


class RouterSession:
    """Written in the event loop: the cores send into it, its driver takes the messages out.

    `on_ready` tells the driver that there is a message to take, or that the session is over. It may be called more
    often than that.
    """

    def __init__(self, router_incarnation: str, on_ready: Callable[[], None]):
        self.router_incarnation = router_incarnation
        self._on_ready = on_ready
        self._queue: deque[decode_pb2.SessionResponse] = deque()
        self._is_open = True

    @property
    def is_overflowing(self) -> bool:
        return len(self._queue) >= MAX_QUEUED_MESSAGES

    @property
    def is_over(self) -> bool:
        """Whether it is closed and everything queued before was taken."""
        return not self._is_open and not self._queue

    def send(self, message: SessionMessage) -> None:
        """Queues a message. At the bound the session is closed instead; a closed session drops what is sent."""
        if not self._is_open:
            return
        if self.is_overflowing:
            self.close()
            return
        content: dict[str, Any] = {_FIELD_OF[message.DESCRIPTOR.name]: message}
        self._queue.append(decode_pb2.SessionResponse(**content))
        self._on_ready()

    def close(self) -> None:
        """The session is over once what is queued was taken."""
        self._is_open = False
        self._on_ready()

    def next_message(self) -> decode_pb2.SessionResponse | None:
        """Takes the oldest queued message; None when none is queued."""
        return self._queue.popleft() if self._queue else None
