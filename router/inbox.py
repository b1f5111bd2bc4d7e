"""What reaches one attempt at a request, from prefill and decode alike: a bounded buffer its task empties in one go."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from isthmus.errors import IsthmusError
from isthmus.v1 import decode_pb2, prefill_pb2

MAX_BUFFERED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Failed:
    """One side can do no more for this attempt; `transfer`: decode has no blocks to decode from."""

    source: Literal["prefill", "decode", "transfer"]
    error: IsthmusError


# The workers' own messages: two of a prefill call, and of a session what decode says of the stream while it is held.
Event = prefill_pb2.FirstToken | prefill_pb2.Done | decode_pb2.StreamTokens | decode_pb2.StreamEnded | Failed


class Inbox:
    """Events in order of arrival, each with its time. Event loop only; one task takes, any may put.

    Bounded by tokens (other events are a handful a request): a put beyond the bound drops the tokens and calls
    `on_overflow`, because a request whose client does not read must not grow, nor slow down its neighbours.
    """

    def __init__(self, now: Callable[[], float], on_overflow: Callable[[], None], *, max_tokens: int):
        self._now = now
        self._on_overflow = on_overflow
        self._max_tokens = max_tokens
        self._events: list[tuple[float, Event]] = []
        self._num_tokens = 0
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, decode_pb2.StreamTokens):
            self._num_tokens += len(event.tokens)
            if self._num_tokens > self._max_tokens:
                self._on_overflow()
                return
        self._events.append((self._now(), event))
        self._arrived.set()

    async def take(self) -> list[tuple[float, Event]]:
        """Everything that has arrived, at least one event."""
        await self._arrived.wait()
        self._arrived.clear()
        events, self._events = self._events, []
        self._num_tokens = 0
        return events
