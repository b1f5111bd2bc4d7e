"""Who may enter, and in which order: slots for requests in flight and turns at placement, by priority, then arrival."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from isthmus.errors import Overloaded

RETRY_AFTER_S = 0.5


# Negated priority and arrival: lower goes first. A request keeps its place through every line it stands in.
Order = tuple[int, int]


class Line:
    """`permits` may pass at a time, the rest wait in order. Who leaves the line early takes no permit along."""

    def __init__(self, permits: int):
        self.num_free = permits
        self._waiting: list[tuple[Order, asyncio.Future[None]]] = []  # a heap; orders are unique

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def turn(self, order: Order, timeout_s: float) -> AsyncIterator[None]:
        """Raises Overloaded when the turn does not come within `timeout_s`."""
        await self._acquire(order, timeout_s)
        try:
            yield
        finally:
            self._release()

    async def _acquire(self, order: Order, timeout_s: float) -> None:
        if self.num_free and not self._waiting:
            self.num_free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (order, turn))
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except (asyncio.CancelledError, TimeoutError) as error:
            if turn.done() and not turn.cancelled():
                self._release()  # the permit was handed over in the same moment
            elif (order, turn) in self._waiting:  # a release since then may have passed it over
                self._waiting.remove((order, turn))
                heapq.heapify(self._waiting)
            if isinstance(error, TimeoutError):
                raise Overloaded("waited too long in the queue", retry_after_s=RETRY_AFTER_S) from error
            raise

    def _release(self) -> None:
        """Hands the permit to the first in line, or puts it back."""
        while self._waiting:
            _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self.num_free += 1


class Admission:
    """At most `max_streams` requests in flight; at most `max_queue` wait, for a slot or for a place at the workers."""

    def __init__(self, max_streams: int, max_queue: int):
        self._max_streams = max_streams
        self._max_queue = max_queue
        self._slots = Line(max_streams)
        # One request at a time looks for a prefill worker, so a large one is not starved by small ones behind it.
        self.placing = Line(1)
        # The same for blocks, in a line of its own: who stands here holds a prefill place others wait for.
        self.reserving = Line(1)
        self._sequence = itertools.count()

    @property
    def num_streams(self) -> int:
        return self._max_streams - self._slots.num_free

    @property
    def num_queued(self) -> int:
        return self._slots.num_waiting + self.placing.num_waiting + self.reserving.num_waiting

    def order(self, priority: int) -> Order:
        return -priority, next(self._sequence)

    def slot(self, order: Order, timeout_s: float) -> AbstractAsyncContextManager[None]:
        """Waits for a slot and holds it. Raises Overloaded, at once when the queue is full."""
        if self.num_queued >= self._max_queue:
            detail = f"{self.num_queued} requests are waiting; the queue is full"
            raise Overloaded(detail, retry_after_s=RETRY_AFTER_S)
        return self._slots.turn(order, timeout_s)
