"""What the store has still to be told: the order, the bound, what an answer means and when to try again.

A worker never waits for Redis. It reports its changes here, and a driver (`mirror_task.py`) applies them one by one:

    report(change) --> take(now) --> the driver applies it --> settle(answer) or fail(error, now)
"""

from collections import deque

from kv_transfer.counters import Counters
from kv_transfer.ownership.changes import MirroredChange, Restate
from kv_transfer.ownership.store import StoreRefused, StoreUnavailable, TransitionResult

RETRY_S = 0.2  # between two tries while the store is away
MAX_CHANGES = 4096
_AT_ONCE = float("-inf")


class Mirror:
    """The changes that wait, the oldest first. Its driver is the one caller of every method and keeps them in turn.

    A change is tried again while the store is away, and only then: one that fails otherwise must not hold up the
    others. At the bound the oldest change is dropped, even one that is being applied. Refusals, unknown ids, failures
    and drops are counted: they are alarms, and change nothing in the worker.
    """

    def __init__(self, counters: Counters, max_changes: int = MAX_CHANGES):
        self._counters = counters
        self._max_changes = max_changes
        self._waiting: deque[MirroredChange] = deque()
        self._oldest = 0  # how many changes have left, and so the number of the oldest that waits
        self._taken: int | None = None  # the number of the change that is being applied
        self._last_restate: int | None = None  # the number of the newest Restate
        self._retry_at = _AT_ONCE

    def __len__(self) -> int:
        """Changes that wait, one that is being applied included."""
        return len(self._waiting)

    @property
    def call_at(self) -> float | None:
        """When `take` may have something; None: not before another report."""
        return self._retry_at if self._waiting else None

    def report(self, change: MirroredChange) -> None:
        """Puts the change behind the others."""
        if isinstance(change, Restate):
            self._last_restate = self._oldest + len(self._waiting)
        self._waiting.append(change)
        if len(self._waiting) > self._max_changes:
            self._remove_oldest()
            self._counters.add("mirror.dropped")

    def take(self, now: float) -> MirroredChange | None:
        """The change to apply now, which the driver settles or fails; None when there is none before `call_at`.

        Of several Restates that wait only the newest is given out: it says all that the others would.
        """
        if now < self._retry_at:
            return None
        while self._waiting and self._is_superseded(self._waiting[0]):
            self._remove_oldest()
        if not self._waiting:
            return None
        self._taken = self._oldest
        return self._waiting[0]

    def settle(self, answer: TransitionResult | None) -> None:
        """The change that was taken is done; `answer` is what the store said of a handoff's change."""
        if answer is not None and answer is not TransitionResult.APPLIED:
            self._counters.add(f"mirror.{answer.name.lower()}")
        self._remove_taken()

    def fail(self, error: Exception, now: float) -> bool:
        """The change that was taken failed. Returns False when it will be tried again, True when it is given up."""
        if isinstance(error, StoreUnavailable) and not isinstance(error, StoreRefused):
            self._counters.add("mirror.unavailable")
            self._retry_at = now + RETRY_S
            return False
        self._counters.add("mirror.failed")
        self._remove_taken()
        return True

    def _is_superseded(self, change: MirroredChange) -> bool:
        return isinstance(change, Restate) and self._oldest != self._last_restate

    def _remove_taken(self) -> None:
        if self._taken == self._oldest:  # else the bound has dropped it meanwhile
            self._remove_oldest()
        self._taken = None

    def _remove_oldest(self) -> None:
        self._waiting.popleft()
        self._oldest += 1
