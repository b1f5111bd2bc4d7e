"""What reaches one attempt at a request, from prefill and decode alike: a bounded buffer its task empties in one go."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from google.protobuf.message import Message

from isthmus.errors import IsthmusError
from isthmus.v1 import decode_pb2

MAX_BUFFERED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Failed:
    """The source can do no more for this attempt."""

    error: IsthmusError
    in_company: bool = False  # a worker was lost, and other requests with it


# The workers' own messages, passed on as they came.
Event = Message | Failed


class Arrival(NamedTuple):
    at: float  # on the router's clock
    source: "Source"
    event: Event


class Inbox:
    """Events in order of arrival. Event loop only; one task takes, any may put through a source.

    Bounded by tokens (other events are a handful a request): a put beyond the bound drops the tokens and calls
    `on_overflow`, because a request whose client does not read must not grow, nor slow down its neighbours.
    """

    def __init__(self, now: Callable[[], float], on_overflow: Callable[[], None], *, max_tokens: int):
        self._now = now
        self._on_overflow = on_overflow
        self._max_tokens = max_tokens
        self._arrivals: list[Arrival] = []
        self._num_tokens = 0
        self._arrived = asyncio.Event()

    def put(self, source: "Source", event: Event) -> None:
        if isinstance(event, decode_pb2.StreamTokens):
            self._num_tokens += len(event.tokens)
            if self._num_tokens > self._max_tokens:
                self._on_overflow()
                return
        self._arrivals.append(Arrival(self._now(), source, event))
        self._arrived.set()

    async def take(self) -> list[Arrival]:
        """Everything that has arrived, at least one event; events of a source closed meanwhile are left out."""
        await self._arrived.wait()
        self._arrived.clear()
        arrivals, self._arrivals = self._arrivals, []
        self._num_tokens = 0
        return [arrival for arrival in arrivals if arrival.source.is_open]


@dataclass(eq=False, slots=True)
class Source:
    """One worker's way into an inbox: its events are known by it, and end with it."""

    inbox: Inbox
    is_open: bool = True

    def put(self, event: Event) -> None:
        if self.is_open:
            self.inbox.put(self, event)

    def close(self) -> None:
        """Nothing of this source is heard any more, what waits in the inbox included."""
        self.is_open = False
