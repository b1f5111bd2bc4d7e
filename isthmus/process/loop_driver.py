"""Runs cores in an asyncio event loop: their turns when they are ready, and at the times they asked for."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from isthmus.clock import Clock

Turn = Callable[[float], float | None]  # the time -> when to call again at the latest; None: not before `ready`


class Driver(Protocol):
    """One core's driver."""

    def ready(self) -> None:
        """The core has something to do: its turn comes soon, once for any number of calls."""
        ...

    def stop(self) -> None:
        """No turn comes any more."""
        ...


Drive = Callable[[Turn], Driver]  # begins to drive a core; the event loop's, or a simulator's


class LoopDriver:
    """Event loop only. A turn that raises ends the core's driving, and `on_failure` hears of it."""

    def __init__(self, turn: Turn, clock: Clock, on_failure: Callable[[BaseException], None]):
        self._turn = turn
        self._clock = clock
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._soon: asyncio.Handle | None = None
        self._later: asyncio.TimerHandle | None = None
        self._is_stopped = False

    def ready(self) -> None:
        if self._soon is None and not self._is_stopped:
            self._soon = self._loop.call_soon(self._run)

    def stop(self) -> None:
        self._is_stopped = True
        for handle in (self._soon, self._later):
            if handle is not None:
                handle.cancel()

    def _run(self) -> None:
        self._soon = None
        if self._is_stopped:
            return
        if self._later is not None:
            self._later.cancel()
            self._later = None
        try:
            at = self._turn(self._clock.now())
        except BaseException as error:
            self.stop()
            self._on_failure(error)
            if not isinstance(error, Exception):
                raise
            return
        if at is not None and not self._is_stopped:
            self._later = self._loop.call_later(max(0.0, at - self._clock.now()), self._run)
