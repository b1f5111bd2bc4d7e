"""Time as a collaborator: services take a Clock, tests pass a ManualClock (isthmus.testing)."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic time in seconds; only differences mean anything."""

    def now(self) -> float: ...


class SystemClock:
    """CLOCK_MONOTONIC: comparable between processes of one machine."""

    def now(self) -> float:
        return time.monotonic()
