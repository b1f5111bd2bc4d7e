"""Counts by name, written by any thread: refusals, alarms, drops. Names come from enums, so their number is bounded."""

import threading
from collections import Counter


class Counters:
    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount

    def read(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)
