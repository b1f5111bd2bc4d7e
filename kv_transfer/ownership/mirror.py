"""Mirrors handoffs and streams into the store, off the token path: whoever reports a change never waits for Redis."""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from isthmus.log import get_logger
from kv_transfer.counters import Counters
from kv_transfer.ownership.store import OwnershipStore, StoreRefused, StoreUnavailable, TransitionResult

_RETRY_S = 0.2
log = get_logger("mirror")

Change = Callable[[OwnershipStore], Awaitable[object]]


class HandoffMirror:
    """Any thread may report; `run` is a task of the loop that owns the store and applies in order.

    A change is tried again while Redis is away, and only then: one that fails otherwise must not hold up the others. At
    the bound the oldest is dropped. Refusals, unknown ids, failures and drops are counted: they are alarms, and change
    nothing in the worker.
    """

    def __init__(self, store: OwnershipStore, *, max_changes: int = 4096):
        self._store = store
        self._max_changes = max_changes
        self._changes: deque[Change] = deque()
        self._lock = threading.Lock()
        self.counters = Counters()
        self._loop: asyncio.AbstractEventLoop | None = None  # None: not running yet
        self._some = asyncio.Event()
        self._none = asyncio.Event()

    def report(self, change: Change) -> None:
        """`change` calls the store; what it returns is looked at when it is a TransitionResult."""
        with self._lock:
            self._changes.append(change)
            if len(self._changes) > self._max_changes:
                self._changes.popleft()
                self.counters.add("mirror.dropped")
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._some.set)

    async def run(self) -> None:
        """Until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            while self._changes:  # only this task takes out the last one
                if not await self._apply(self._changes[0]):
                    await asyncio.sleep(_RETRY_S)
            self._none.set()
            await self._some.wait()
            self._some.clear()

    async def flush(self, timeout_s: float) -> bool:
        """Waits until everything reported so far is applied. False if it was not in time. In the loop of `run`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._changes:
                    self._none.clear()
                    self._some.set()
                    await self._none.wait()
        except TimeoutError:
            return False
        return True

    async def _apply(self, change: Change) -> bool:
        try:
            result = await change(self._store)
        except Exception as error:  # noqa: BLE001 - the task's root: what follows must still be written
            if isinstance(error, StoreUnavailable) and not isinstance(error, StoreRefused):
                self.counters.add("mirror.unavailable")
                return False
            self.counters.add("mirror.failed")
            log.warning("mirror.failed", cause=repr(error))
            result = None
        if isinstance(result, TransitionResult) and result is not TransitionResult.APPLIED:
            self.counters.add(f"mirror.{result.name.lower()}")
        with self._lock:
            if self._changes[0] is change:  # else the bound has dropped it meanwhile
                self._changes.popleft()
        return True
