"""What reaches one attempt at a request, from prefill and decode alike: a bounded buffer its task empties in one go."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.errors import IsthmusError
from isthmus.types import FinishReason
from isthmus.v1 import prefill_pb2, types_pb2

MAX_BUFFERED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Token 0 from prefill."""

    message: prefill_pb2.FirstToken


@dataclass(frozen=True, slots=True)
class PrefillDone:
    message: prefill_pb2.Done


@dataclass(frozen=True, slots=True)
class PrefillFailed:
    error: IsthmusError


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    index: int
    tokens: Sequence[types_pb2.Token]


@dataclass(frozen=True, slots=True)
class DecodeEnded:
    """The decode worker ended the stream and has freed its blocks."""

    finish_reason: FinishReason | None
    num_tokens: int
    reason: str  # ErrorInfo reason of FinishReason.ERROR
    detail: str


@dataclass(frozen=True, slots=True)
class DecodeFailed:
    """No blocks to decode from: the transfer failed, or the session or its worker was lost."""

    error: IsthmusError


Event = FirstToken | PrefillDone | PrefillFailed | DecodeTokens | DecodeEnded | DecodeFailed


class Inbox:
    """Events in order of arrival, each with its time. Event loop only; one task takes, any may put.

    Bounded by tokens (other events are a handful a request): a put beyond the bound drops the tokens and calls
    `on_overflow`, because a request whose client does not read must not grow, nor slow down its neighbours.
    """

    def __init__(
        self, now: Callable[[], float], on_overflow: Callable[[], None], *, max_tokens: int = MAX_BUFFERED_TOKENS
    ):
        self._now = now
        self._on_overflow = on_overflow
        self._max_tokens = max_tokens
        self._events: list[tuple[float, Event]] = []
        self._num_tokens = 0
        self._arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, DecodeTokens):
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
