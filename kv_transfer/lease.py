"""Keeps a worker's lease alive from a thread and an event loop of its own: a busy step loop never looks dead."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from isthmus.errors import IsthmusError
from kv_transfer.counters import Counters
from kv_transfer.ownership import BlockSnapshot, OwnershipStore, WorkerRecord

_STOP_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class LeaseTimes:
    heartbeat_s: float = 0.5
    ttl_s: float = 3.0


class LeaseKeeper:
    """`record` (and `blocks`) are called from the keeper's thread and must be quick. Redis may be down at any time."""

    def __init__(
        self,
        store_factory: Callable[[], OwnershipStore],
        record: Callable[[], WorkerRecord],
        *,
        times: LeaseTimes | None = None,
        blocks: Callable[[], BlockSnapshot] | None = None,
    ):
        self._store_factory = store_factory
        self._record = record
        self._blocks = blocks
        self._times = times or LeaseTimes()
        self._counts = Counters()
        self._last_ok: float | None = None
        self._published: int | None = None
        self._stop = threading.Event()
        self._wake: Callable[[], object] = _nothing_waits
        self._thread = threading.Thread(target=self._run, name="lease-keeper", daemon=True)

    @property
    def last_ok(self) -> float | None:
        """time.monotonic() of the last renewal that Redis confirmed."""
        return self._last_ok

    @property
    def counters(self) -> dict[str, int]:
        return self._counts.read()

    def start(self) -> None:
        self._thread.start()

    def renew_now(self) -> None:
        """Heartbeats at once, e.g. when readiness changed. Any thread."""
        self._wake()

    def stop(self) -> None:
        """Drops the lease if Redis answers in time, and ends the thread."""
        self._stop.set()
        self._wake()
        if self._thread.is_alive():
            self._thread.join(_STOP_TIMEOUT_S + self._times.heartbeat_s)

    def _run(self) -> None:
        asyncio.run(self._keep())

    async def _keep(self) -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(woken.set)
        store = self._store_factory()
        while not self._stop.is_set():
            try:
                async with asyncio.timeout(self._times.ttl_s):
                    await self._beat(store)
            except (IsthmusError, TimeoutError):
                self._counts.add("lease.failed")
                self._published = None  # a store that comes back may have lost the snapshot
            await _wait(woken, self._times.heartbeat_s)
        self._wake = self._stop.set
        await self._give_up(store)

    async def _beat(self, store: OwnershipStore) -> None:
        record = self._record()
        await store.put_worker(record, self._times.ttl_s)
        self._counts.add("lease.renewed")
        self._last_ok = time.monotonic()
        await self._publish(store, record.incarnation)

    async def _publish(self, store: OwnershipStore, incarnation: str) -> None:
        """The snapshot goes out when its sequence has moved; the lease keeps it alive in between."""
        if self._blocks is None or (snapshot := self._blocks()).sequence == self._published:
            return
        await store.blocks.publish(incarnation, snapshot, self._times.ttl_s)
        self._published = snapshot.sequence

    async def _give_up(self, store: OwnershipStore) -> None:
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await store.drop_worker(self._record().incarnation)
        except (IsthmusError, TimeoutError):
            self._counts.add("lease.drop_failed")
        await store.close()


def _nothing_waits() -> None:
    """The loop is not there yet, or not any more; its first beat comes at once."""


async def _wait(woken: asyncio.Event, span_s: float) -> None:
    try:
        async with asyncio.timeout(span_s):
            await woken.wait()
    except TimeoutError:
        return
    woken.clear()
