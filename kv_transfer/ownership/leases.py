"""Keeps a worker's lease alive from a thread and an event loop of its own: a busy step loop never looks dead.

Each renewal says what the store held until then. Anything but what was written last means that the store was flushed,
rolled back or overwritten: the worker publishes again.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from isthmus.errors import IsthmusError
from isthmus.failpoints import Failpoints
from kv_transfer.counters import Counters
from kv_transfer.ownership.store import BlockSnapshot, OwnershipStore, Renewed, WorkerRecord

_STOP_TIMEOUT_S = 2.0


@dataclass(eq=False, slots=True)
class LeaseKeeper:
    """`record`, `blocks` and `on_lost` are called from the keeper's thread and must be quick. Redis may be down at any
    time. `on_lost`: the store lost or changed what this worker had written; it may be called without need.
    """

    store_factory: Callable[[], OwnershipStore]
    record: Callable[[], WorkerRecord]
    heartbeat_s: float
    ttl_s: float
    blocks: Callable[[], BlockSnapshot] | None = None
    on_lost: Callable[[], None] = lambda: None
    failpoints: Failpoints = field(default_factory=Failpoints)
    counters: Counters = field(default_factory=Counters, init=False)
    last_ok: float | None = field(default=None, init=False)  # time.monotonic() of the last renewal Redis confirmed
    _written: Renewed | None = field(default=None, init=False)  # what the next renewal should find
    _is_stopping: bool = field(default=False, init=False)
    _woken: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._keep()), name="lease-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def renew_now(self) -> None:
        """Heartbeats at once, e.g. when readiness changed. Any thread."""
        self._woken.set()

    def stop(self) -> None:
        """Drops the lease if Redis answers in time, and ends the thread."""
        self._is_stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S + self.heartbeat_s)

    async def _keep(self) -> None:
        store = self.store_factory()
        while not self._is_stopping:
            try:
                async with asyncio.timeout(self.ttl_s):
                    await self._beat(store)
            except Exception:  # noqa: BLE001 - the thread's root: a worker must not lose its lease by one bad beat
                self.counters.add("lease.failed")
            self._woken.wait(self.heartbeat_s)  # holds this thread's own loop, where nothing else runs
            self._woken.clear()
        await self._give_up(store)

    async def _beat(self, store: OwnershipStore) -> None:
        self.failpoints.hit("lease.beat")
        written = self._written
        record = replace(self.record(), renewal=self.counters["lease.renewed"])
        found = await store.put_worker(record, self.ttl_s)
        self.counters.add("lease.renewed")
        self.last_ok = time.monotonic()
        self._written = Renewed(record, found.blocks)
        if written is not None and found != written:
            self.counters.add("lease.store_lost")
            self.on_lost()
        if self.blocks is not None and (snapshot := self.blocks()).stamp != found.blocks:
            await store.blocks.publish(record.incarnation, snapshot, self.ttl_s)
            self._written = Renewed(record, snapshot.stamp)

    async def _give_up(self, store: OwnershipStore) -> None:
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await store.drop_worker(self.record().incarnation)
        except (IsthmusError, TimeoutError):
            self.counters.add("lease.drop_failed")
        await store.close()
