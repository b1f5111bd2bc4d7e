"""Time as a collaborator: drivers take a Clock, cores are told the time; tests move a clock of their own."""

import asyncio
import time
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class Clock(Protocol):
    """Monotonic time; only differences mean anything."""

    def now(self) -> float:
        """Seconds."""
        ...

    def now_ns(self) -> int:
        """The same moment in nanoseconds."""
        ...


class LoopClock(Clock, Protocol):
    """A clock that an event loop can wait by."""

    async def sleep(self, seconds: float) -> None: ...

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """The block is cancelled, and left with TimeoutError, after so many seconds; None: never."""
        ...


class SystemClock:
    """CLOCK_MONOTONIC: comparable between processes of one machine."""

    def now(self) -> float:
        return time.monotonic()

    def now_ns(self) -> int:
        return time.monotonic_ns()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[asyncio.Timeout]:
        return asyncio.timeout(seconds)
