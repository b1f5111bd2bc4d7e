"""Counts by name, written by any thread: refusals, alarms, drops. Names come from enums, so their number is bounded."""

import threading
from collections import Counter


class Counters(Counter[str]):
    """Other threads than the writers look at it through `read`."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def add(self, name: str) -> None:
        with self._lock:
            self[name] += 1

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self)
