"""Membership's driver: keeps the lease while the worker lives, and lets it serve as soon as its layout fits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from isthmus.config import WorkerConfig
from isthmus.kv.layout import KvLayout
from isthmus.log import get_logger
from isthmus.process.worker_context import WorkerContext
from isthmus.v1 import admin_pb2
from kv_transfer.ownership.lease_thread import LeaseHolder, LeaseThread
from kv_transfer.ownership.leases import LeaseTerms
from kv_transfer.ownership.membership import Joining, Verdict, WorkerFacts, newest_blocks, worker_record
from kv_transfer.ownership.store import OpenStore, OwnershipStore, StoreUnavailable, WorkerRecord

log = get_logger("membership")
Status = Callable[[], admin_pb2.GetStatusResponse]
Published = Callable[[], tuple[int, list[bytes]]]  # BlockPool.published


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
    pid: int
    on_store_lost: Callable[[], None] = lambda: None

    @contextlib.asynccontextmanager
    async def join(self, store: OwnershipStore, layout: KvLayout, published: Published) -> AsyncIterator[None]:
        """Leases the record, then serves as soon as it is registered and its layout fits; ends the lease at the end."""
        holder = LeaseHolder(
            record=lambda: self._record(layout),
            blocks=lambda: newest_blocks(*published()),
            on_lost=self._note_loss,
        )
        lease = LeaseThread(
            lambda: self.open_store(self.config.redis_url),
            holder,
            LeaseTerms(self.config.heartbeat_s, self.config.lease_s),
            self.context.clock,
            self.context.failpoints,
        )
        lease.start()
        joining = Joining(layout, self.context.identity.incarnation)
        waiting = asyncio.create_task(self._serve_when_it_may(store, joining, lease), name="membership")
        try:
            yield
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await asyncio.to_thread(lease.stop)

    async def _serve_when_it_may(self, store: OwnershipStore, joining: Joining, lease: LeaseThread) -> None:
        clock = self.context.clock
        while joining.call_at is not None:
            await clock.sleep(max(0.0, joining.call_at - clock.now()))
            try:
                others = await store.list_workers()
            except StoreUnavailable:
                joining.not_answered(clock.now())
                continue
            verdict = joining.judge(others, is_registered=lease.last_ok is not None, now=clock.now())
            self._carry_out(verdict, lease)

    def _carry_out(self, verdict: Verdict, lease: LeaseThread) -> None:
        if verdict.waits_for is None:
            self.context.health.ready()
            lease.renew_now()
            return
        if verdict.is_news:
            log.info("membership.waiting", reason=verdict.waits_for)
        self.context.health.not_ready(verdict.waits_for)

    def _note_loss(self) -> None:
        log.warning("membership.store_lost")
        self.context.ledger.record("store.lost")
        self.on_store_lost()

    def _record(self, layout: KvLayout) -> WorkerRecord:
        context = self.context
        facts = WorkerFacts(
            identity=context.identity,
            pid=self.pid,
            layout=layout,
            status=self.status(),
            health=context.health.snapshot(),
            seconds_since_progress=context.health.watch.seconds_since_progress,
        )
        return worker_record(facts)
