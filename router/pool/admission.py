"""Who may enter, and in which order: slots for requests in flight and turns at placement, by priority, then arrival.

A core: it waits for nothing itself. Whoever stands in a line is woken when its turn has come.
"""

import heapq
import itertools
from collections.abc import Callable
from types import TracebackType

from isthmus.errors import Overloaded
from isthmus.routine import Routine

RETRY_AFTER_S = 0.5


# Negated priority and arrival: lower goes first. A request keeps its place through every line it stands in.
Order = tuple[int, int]


class Turn:
    """One request's stand in a line. As a context manager it leaves the line, or gives its permit back, at the end."""

    def __init__(self, line: "Line", wake: Callable[[], None]):
        self._line = line
        self._wake = wake
        self.has_come = False
        self.has_left = False

    def __enter__(self) -> "Turn":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.leave()

    async def comes(self, routine: Routine, until: float) -> None:
        """Returns with the permit. Raises Overloaded when it has not come at `until`."""
        if not await routine.wait_for(lambda: self.has_come, until):
            raise Overloaded("waited too long in the queue", retry_after_s=RETRY_AFTER_S)

    def leave(self) -> None:
        """Once; whoever leaves before the turn has come takes no permit along."""
        if not self.has_left:
            self.has_left = True
            self._line.note_left(self)

    def grant(self) -> None:
        """The line hands the permit over."""
        self.has_come = True
        self._wake()


class Line:
    """`permits` may pass at a time, the others wait in order. Written by itself alone, through its turns."""

    def __init__(self, permits: int):
        self.num_free = permits
        self.num_waiting = 0
        self._waiting: list[tuple[Order, Turn]] = []  # a heap; orders are unique; those that left are passed over

    def enter(self, order: Order, wake: Callable[[], None]) -> Turn:
        """Stands in line; `wake` is called when the turn comes, not when it has come at once."""
        turn = Turn(self, wake)
        if self.num_free and not self.num_waiting:
            self.num_free -= 1
            turn.has_come = True
        else:
            heapq.heappush(self._waiting, (order, turn))
            self.num_waiting += 1
        return turn

    def note_left(self, turn: Turn) -> None:
        """For `Turn.leave`: the permit goes to the first in line, or back."""
        if not turn.has_come:
            self.num_waiting -= 1
            return
        while self._waiting:
            _, following = heapq.heappop(self._waiting)
            if not following.has_left:
                self.num_waiting -= 1
                following.grant()
                return
        self.num_free += 1


class Admission:
    """At most `max_streams` requests in flight; at most `max_queue` wait, for a slot or for a place at the workers."""

    def __init__(self, max_streams: int, max_queue: int):
        self._max_streams = max_streams
        self._max_queue = max_queue
        self._slots = Line(max_streams)
        # One request at a time looks for a prefill worker, so that small ones behind a large one do not starve it.
        self.placing = Line(1)
        # The same for blocks, in a line of its own: who stands here holds a prefill place others wait for.
        self.reserving = Line(1)
        # For requests that two workers were lost with: one of them is computed at a time.
        self.quarantine = Line(1)
        self._sequence = itertools.count()

    @property
    def num_streams(self) -> int:
        return self._max_streams - self._slots.num_free

    @property
    def num_queued(self) -> int:
        return self._slots.num_waiting + self.placing.num_waiting + self.reserving.num_waiting

    def order(self, priority: int) -> Order:
        """The place of a request that arrives now."""
        return -priority, next(self._sequence)

    def slot(self, order: Order, wake: Callable[[], None]) -> Turn:
        """Stands in line for a slot. Raises Overloaded at once when the queue is full."""
        if self.num_queued >= self._max_queue:
            detail = f"{self.num_queued} requests are waiting; the queue is full"
            raise Overloaded(detail, retry_after_s=RETRY_AFTER_S)
        return self._slots.enter(order, wake)
