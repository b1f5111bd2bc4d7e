"""A store in virtual time for tests of cores: no event loop, and it can be away, flushed or rolled back."""

from collections.abc import Coroutine
from typing import Any, TypeVar

from isthmus.testing.manual_clock import ManualClock
from kv_transfer.ownership.memory import MemoryKeys, MemoryOwnership

Answer = TypeVar("Answer")


class VirtualStore(MemoryOwnership):
    """The in-memory twin with a clock that tests move."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        super().__init__(self.clock)

    def flush(self) -> None:
        self.keys = MemoryKeys.empty(self.clock)


def at_once(call: Coroutine[Any, Any, Answer]) -> Answer:
    """The answer of a call that waits for nothing."""
    try:
        call.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the call waits for something")
