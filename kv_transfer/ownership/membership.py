"""A worker's place among the others: its leased record, and whether its cache layout fits theirs.

The first worker that serves decides the layout. One that differs stays not-ready, naming the field, until
the others are gone.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.config import WorkerConfig
from isthmus.kv.layout import KvLayout
from isthmus.log import get_logger
from isthmus.process.worker_context import WorkerContext
from isthmus.types import BlockCounts
from isthmus.v1 import admin_pb2
from kv_transfer.ownership.leases import LeaseKeeper
from kv_transfer.ownership.mirror import HandoffMirror
from kv_transfer.ownership.store import (
    MAX_BLOCK_HASHES,
    BlockSnapshot,
    OpenStore,
    OwnershipStore,
    StoreUnavailable,
    WorkerLoad,
    WorkerRecord,
)

log = get_logger("membership")
Status = Callable[[], admin_pb2.GetStatusResponse]
Published = Callable[[], tuple[int, list[bytes]]]  # BlockPool.published
FLUSH_S = 0.5
REGISTER_POLL_S = 0.05


def _snapshot(num_changes: int, hashes: list[bytes]) -> BlockSnapshot:
    """The newest contents, as many as a snapshot holds."""
    return BlockSnapshot(num_changes, hashes[-MAX_BLOCK_HASHES:])


@contextlib.asynccontextmanager
async def running(mirror: HandoffMirror) -> AsyncIterator[HandoffMirror]:
    """The mirror's task; at the end what was reported is still written, within a bound."""
    task = asyncio.create_task(mirror.run(), name="handoff-mirror")
    try:
        yield mirror
    finally:
        await mirror.flush(FLUSH_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def find_conflict(layout: KvLayout, incarnation: str, others: Sequence[WorkerRecord]) -> str | None:
    """How this layout differs from that of a worker that serves, readably; None when it fits. Pure."""
    for other in others:
        if other.serving and other.incarnation != incarnation and other.layout.fingerprint != layout.fingerprint:
            differences = "; ".join(layout.differing_fields(other.layout))
            return f"cache layout differs from that of {other.name}: {differences}"
    return None


@dataclass(frozen=True, slots=True)
class Membership:
    """Registers a worker while `join` is entered; `status` is its own part of GetStatus, asked by any thread.

    `on_store_lost` is called by the lease's thread when Redis lost or changed what this worker wrote: whatever else is
    its own there (handoffs, stream hints) is to be reported again.
    """

    config: WorkerConfig
    context: WorkerContext
    status: Status
    open_store: OpenStore
    on_store_lost: Callable[[], None] = lambda: None

    @contextlib.asynccontextmanager
    async def join(self, store: OwnershipStore, layout: KvLayout, published: Published) -> AsyncIterator[None]:
        """Leases the record, then serves as soon as it is registered and its layout fits; ends the lease at the end."""
        keeper = LeaseKeeper(
            lambda: self.open_store(self.config.redis_url),
            lambda: self._record(layout),
            heartbeat_s=self.config.heartbeat_s,
            ttl_s=self.config.lease_s,
            blocks=lambda: _snapshot(*published()),
            on_lost=self._note_loss,
            failpoints=self.context.failpoints,
        )
        keeper.start()
        waiting = asyncio.create_task(self._serve_when_layouts_agree(store, layout, keeper), name="membership")
        try:
            yield
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await asyncio.to_thread(keeper.stop)

    async def _serve_when_layouts_agree(self, store: OwnershipStore, layout: KvLayout, keeper: LeaseKeeper) -> None:
        while True:
            with contextlib.suppress(StoreUnavailable):
                conflict = find_conflict(layout, self.context.identity.incarnation, await store.list_workers())
                if conflict is None and keeper.last_ok is not None:
                    self.context.health.ready()
                    keeper.renew_now()
                    return
                reason = conflict or "not registered in Redis yet"
                if self.context.health.snapshot().reason != reason:
                    log.info("membership.waiting", reason=reason)
                self.context.health.not_ready(reason)
            await asyncio.sleep(REGISTER_POLL_S)

    def _note_loss(self) -> None:
        log.warning("membership.store_lost")
        self.context.ledger.record("store.lost")
        self.on_store_lost()

    def _record(self, layout: KvLayout) -> WorkerRecord:
        status, health, identity = self.status(), self.context.health.snapshot(), self.context.identity
        blocks = status.blocks
        who_and_where: dict[str, Any] = {**asdict(identity), "zmq_endpoint": identity.zmq_endpoint or None}
        return WorkerRecord(
            **who_and_where,
            pid=os.getpid(),
            layout=layout,
            numerics_digest=status.numerics_digest,
            numerics_ingredients=dict(status.numerics_ingredients),
            model_digest=layout.model_digest,
            load=WorkerLoad(
                blocks=BlockCounts(blocks.total, blocks.free, blocks.cached, blocks.referenced, blocks.draining),
                num_streams=status.num_streams,
                num_queued=status.num_queued,
            ),
            serving=health.serving,
            state=health.state.value,
            seconds_since_progress=self.context.health.watch.seconds_since_progress,
        )
