"""The mirror's driver: an asyncio task that applies to the store what any thread reports."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from isthmus.clock import LoopClock
from isthmus.log import get_logger
from kv_transfer.counters import Counters
from kv_transfer.ownership.changes import MirroredChange, Restate, apply
from kv_transfer.ownership.mirror import MAX_CHANGES, Mirror
from kv_transfer.ownership.store import OwnershipStore, TransitionResult

FLUSH_S = 0.5  # for what is still unwritten when the process ends
log = get_logger("mirror")


class MirrorTask:
    """Owns the mirror's core and serves the event loop of the store. `report` may be called by any thread.

    `restate` is called in that loop when a Restate has its turn, and reports everything anew.
    """

    def __init__(
        self,
        store: OwnershipStore,
        clock: LoopClock,
        restate: Callable[[], None] = lambda: None,
        *,
        max_changes: int = MAX_CHANGES,
    ):
        self.counters = Counters()
        self._store = store
        self._clock = clock
        self._restate = restate
        self._lock = threading.Lock()  # around every call of the core
        self._core = Mirror(self.counters, max_changes)
        self._loop: asyncio.AbstractEventLoop | None = None  # None: not running yet
        self._some = asyncio.Event()  # something was reported
        self._none = asyncio.Event()  # nothing waits

    def report(self, change: MirroredChange) -> None:
        """Returns at once; the store is told in the order of the reports."""
        with self._lock:
            self._core.report(change)
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._some.set)

    async def run(self) -> None:
        """Until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            change = self._take()
            if change is None:
                await self._rest()
                continue
            try:
                answer = await self._carry_out(change)
            except Exception as error:  # noqa: BLE001 - the task's root: what follows must still be written
                self._fail(error)
            else:
                with self._lock:
                    self._core.settle(answer)

    async def flush(self, timeout_s: float) -> bool:
        """Waits until everything reported so far is applied. False if it was not in time. In the loop of `run`."""
        try:
            async with self._clock.timeout(timeout_s):
                while len(self._core):
                    self._none.clear()
                    await self._none.wait()
        except TimeoutError:
            return False
        return True

    def _take(self) -> MirroredChange | None:
        with self._lock:
            change = self._core.take(self._clock.now())
            if not len(self._core):
                self._none.set()
        return change

    async def _rest(self) -> None:
        """Until something is reported or the core wants to be called."""
        with self._lock:
            at = self._core.call_at
        with suppress(TimeoutError):
            async with self._clock.timeout(None if at is None else max(0.0, at - self._clock.now())):
                await self._some.wait()
        self._some.clear()

    async def _carry_out(self, change: MirroredChange) -> TransitionResult | None:
        if isinstance(change, Restate):
            self._restate()
            return None
        return await apply(change, self._store)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            is_given_up = self._core.fail(error, self._clock.now())
        if is_given_up:
            log.warning("mirror.failed", cause=repr(error))


@asynccontextmanager
async def mirroring(mirror: MirrorTask) -> AsyncIterator[MirrorTask]:
    """Runs the mirror's task; at the end what was reported is still written, within FLUSH_S."""
    task = asyncio.create_task(mirror.run(), name="handoff-mirror")
    try:
        yield mirror
    finally:
        await mirror.flush(FLUSH_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
