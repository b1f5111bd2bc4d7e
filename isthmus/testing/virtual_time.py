"""Virtual time: cores run in an order that one seed decides, and hours pass in milliseconds.

What an event loop, its timers and the network between processes do in production is done here by one queue of calls,
each with its moment. Nothing runs but what a test asks for; the same seed gives the same run.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from isthmus.ids import uuid7

Turn = Callable[[float], float | None]


@dataclass(order=True, slots=True)
class _Call:
    at: float
    number: int  # calls of the same moment run in the order in which they were asked for
    function: Callable[[], object] = field(compare=False)
    is_cancelled: bool = field(default=False, compare=False)

    def cancel(self) -> None:
        self.is_cancelled = True


class VirtualTime:
    """The clock, the queue and the source of chance of one simulated world. Written by itself alone."""

    def __init__(self, seed: int = 0, began_at: float = 1000.0):
        self.random = random.Random(seed)
        self._now = began_at
        self._calls: list[_Call] = []
        self._numbers = itertools.count()

    def now(self) -> float:
        return self._now

    def now_ns(self) -> int:
        return round(self._now * 1e9)

    def time(self) -> float:
        """`now`, by the name that `isthmus.testing.memory_wire.Timer` has for it."""
        return self._now

    def call_later(self, delay: float, callback: Callable[[], object], /) -> _Call:
        """`after`, by that Timer's name."""
        return self.after(delay, callback)

    def after(self, seconds: float, function: Callable[[], object]) -> _Call:
        """Calls `function` once, that much later; what is returned can be cancelled."""
        call = _Call(self._now + seconds, next(self._numbers), function)
        heapq.heappush(self._calls, call)
        return call

    def drive(self, turn: Turn) -> "VirtualDriver":
        """Drives a core, as `isthmus.process.loop_driver.LoopDriver` does in an event loop."""
        return VirtualDriver(self, turn)

    def run_until(self, condition: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
        """Runs until the condition holds. Raises AssertionError when it does not within `limit_s` of virtual time."""
        end = self._now + limit_s
        while not condition():
            is_due = bool(self._calls) and self._calls[0].at <= end
            assert is_due, f"not within {limit_s} s: {what}"
            self._run_next()

    def run_for(self, seconds: float) -> None:
        """Everything that is due within so many seconds."""
        end = self._now + seconds
        while self._calls and self._calls[0].at <= end:
            self._run_next()
        self._now = end

    def _run_next(self) -> None:
        call = heapq.heappop(self._calls)
        if not call.is_cancelled:
            self._now = call.at
            call.function()


class VirtualDriver:
    """One core's turns in virtual time. An error of a turn ends the run: it reaches whoever runs the world."""

    def __init__(self, time: VirtualTime, turn: Turn):
        self._time = time
        self._turn = turn
        self._soon: _Call | None = None
        self._later: _Call | None = None
        self._is_stopped = False

    def ready(self) -> None:
        if self._soon is None and not self._is_stopped:
            self._soon = self._time.after(0.0, self._run)

    def stop(self) -> None:
        self._is_stopped = True
        for call in (self._soon, self._later):
            if call is not None:
                call.cancel()

    def _run(self) -> None:
        self._soon = None
        if self._later is not None:
            self._later.cancel()
            self._later = None
        if self._is_stopped:
            return
        at = self._turn(self._time.now())
        if at is not None and not self._is_stopped:
            self._later = self._time.after(max(0.0, at - self._time.now()), self._run)


class SeededIds:
    """`isthmus.ids.Ids` of one simulated process: different for each, the same in every run of a seed."""

    def __init__(self, time: VirtualTime):
        self._time = time

    def request_id(self) -> str:
        return uuid7(round(self._time.now() * 1000), self._time.random.getrandbits(80))

    def incarnation(self) -> str:
        return f"{self._time.random.getrandbits(128):032x}"

    def transfer_id(self) -> str:
        return f"{self._time.random.getrandbits(128):032x}"

    def seed(self) -> int:
        return self._time.random.getrandbits(64)

    def fraction(self) -> float:
        return self._time.random.random()
