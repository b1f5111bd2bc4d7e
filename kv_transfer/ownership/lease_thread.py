"""The lease's driver: a thread with an event loop of its own, so that a busy step loop never looks dead."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.clock import LoopClock
from isthmus.errors import IsthmusError
from isthmus.failpoints import Failpoints
from kv_transfer.counters import Counters
from kv_transfer.ownership.leases import Lease, LeaseTerms
from kv_transfer.ownership.store import BlockSnapshot, OwnershipStore, WorkerRecord

_STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class LeaseHolder:
    """The worker that holds the lease. The lease's thread calls all of this, which must be quick.

    `on_lost`: the store lost or changed what this worker had written; it may be called without need.
    """

    record: Callable[[], WorkerRecord]
    blocks: Callable[[], BlockSnapshot] | None = None  # None: it shows no blocks
    on_lost: Callable[[], None] = lambda: None


class LeaseThread:
    """Owns the thread, the store that it opens there, and the lease's core. Redis may be down at any time."""

    def __init__(
        self,
        open_store: Callable[[], OwnershipStore],
        holder: LeaseHolder,
        terms: LeaseTerms,
        clock: LoopClock,
        failpoints: Failpoints | None = None,
    ):
        self.counters = Counters()
        self._open_store = open_store
        self._holder = holder
        self._core = Lease(terms, self.counters)
        self._clock = clock
        self._failpoints = failpoints or Failpoints()
        self._is_stopping = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._keep()), name="lease-keeper", daemon=True)

    @property
    def last_ok(self) -> float | None:
        """The clock's time of the last renewal that the store confirmed; None: there was none."""
        return self._core.last_ok

    def start(self) -> None:
        self._thread.start()

    def renew_now(self) -> None:
        """Beats at once, for example when readiness changed. Any thread."""
        self._woken.set()

    def stop(self) -> None:
        """Drops the lease if the store answers in time, and ends the thread."""
        self._is_stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S + self._core.terms.heartbeat_s)

    async def _keep(self) -> None:
        store = self._open_store()
        while not self._is_stopping:
            try:
                async with self._clock.timeout(self._core.terms.ttl_s):
                    await self._beat(store)
            except Exception:  # noqa: BLE001 - the thread's root: a worker must not lose its lease by one bad beat
                self._core.failed()
            self._core.rest(self._clock.now())
            # This holds the thread's own loop, where nothing else runs.
            self._woken.wait(max(0.0, self._core.call_at - self._clock.now()))
            self._woken.clear()
        await self._give_up(store)

    async def _beat(self, store: OwnershipStore) -> None:
        self._failpoints.hit("lease.beat")
        ttl_s = self._core.terms.ttl_s
        record = self._core.begin(self._holder.record())
        found = await store.put_worker(record, ttl_s)
        if self._core.renewed(found, self._clock.now()):
            self._holder.on_lost()
        if self._holder.blocks is None:
            return
        snapshot = self._holder.blocks()
        if self._core.must_publish(snapshot):
            await store.blocks.publish(record.incarnation, snapshot, ttl_s)
            self._core.published(snapshot)

    async def _give_up(self, store: OwnershipStore) -> None:
        try:
            async with self._clock.timeout(_STOP_TIMEOUT_S):
                await store.drop_worker(self._holder.record().incarnation)
        except (IsthmusError, TimeoutError):
            self.counters.add("lease.drop_failed")
        await store.close()
