"""The workers: who is registered, who answers, and their calls. Redis is read beside the token path, never on it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc.aio

from isthmus.clock import Clock
from isthmus.convert import block_counts_to_proto
from isthmus.ledger import Ledger
from isthmus.log import get_logger
from isthmus.v1 import admin_pb2, decode_pb2_grpc, prefill_pb2_grpc
from kv_transfer.ownership.store import OwnershipStore, StoreUnavailable, WorkerRecord
from router.session import Session, SessionPeer
from router.workers import UNLISTED_S, DecodeWorker, PrefillWorker, is_hung, numerics_class

WATCH_INTERVAL_S = 0.25
STORE_TIMEOUT_S = 1.0
MAX_WORKERS = 4096
# Fields of a worker's record that the status shows as they are.
_SHOWN = (
    *("name", "role", "incarnation", "pid", "grpc_address", "zmq_endpoint", "http_address"),
    *("state", "numerics_digest", "seconds_since_progress"),
)
_log = get_logger("router.pool")


@dataclass(eq=False, slots=True)
class WorkerPool:
    """Event loop only. `run` watches the registry and owns every session; leaving it closes them all."""

    store: OwnershipStore
    incarnation: str  # this router's
    model_digest: str  # workers of another model are passed over
    connect: Callable[[str], grpc.aio.Channel]
    clock: Clock
    ledger: Ledger
    decode: dict[str, DecodeWorker] = field(default_factory=dict[str, DecodeWorker], init=False)
    prefill: dict[str, PrefillWorker] = field(default_factory=dict[str, PrefillWorker], init=False)
    is_degraded: bool = field(default=False, init=False)  # the registry does not answer: its last view is kept
    has_view: bool = field(default=False, init=False)  # the registry has answered once
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as sessions:
                while True:
                    await self._refresh(sessions)
                    await asyncio.sleep(WATCH_INTERVAL_S)
        finally:
            await self._close_all()

    def usable_decode(self) -> list[DecodeWorker]:
        return [worker for worker in self.decode.values() if worker.takes_work]

    @property
    def has_unmet(self) -> bool:
        """Workers that this router has not spoken to yet: it has just started, or they have."""
        return not self.has_view or any(not worker.session.has_met for worker in self.decode.values())

    def usable_prefill(self) -> list[PrefillWorker]:
        now = self.clock.now()
        return [worker for worker in self.prefill.values() if worker.takes_work(now)]

    def note_change(self) -> None:
        """Something waiting requests may have waited for: room, a worker, a session."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, timeout_s: float) -> None:
        """Returns after a change, or after `timeout_s`: room may also come where this router cannot see it."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def status(self) -> list[admin_pb2.WorkerStatus]:
        """This router's view; `serving` means that it would give the worker something to do."""
        now = self.clock.now()
        prefill = [_status(worker.record, serving=worker.takes_work(now)) for worker in self.prefill.values()]
        return prefill + [_status(worker.record, serving=worker.takes_work) for worker in self.decode.values()]

    async def _refresh(self, sessions: asyncio.TaskGroup) -> None:
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                records = await self.store.list_workers()
        except (StoreUnavailable, TimeoutError) as error:  # sessions go on without it
            if not self.is_degraded:
                _log.warning("registry.unreachable", error=f"{type(error).__name__}: {error}")
                for worker in [*self.decode.values(), *self.prefill.values()]:  # the last view must not age
                    worker.record = replace(worker.record, seconds_since_progress=0.0)
            self.is_degraded = True
        else:
            if self.is_degraded:
                _log.info("registry.back")
            self.is_degraded, self.has_view = False, True
            await self._take_view(records[:MAX_WORKERS], sessions)
        self._lose_hung()
        self.note_change()

    async def _take_view(self, records: list[WorkerRecord], sessions: asyncio.TaskGroup) -> None:
        listed = {record.incarnation: record for record in records if record.model_digest == self.model_digest}
        now = self.clock.now()
        for workers in (self.decode, self.prefill):
            for incarnation, worker in list(workers.items()):
                worker.listed_at = now if incarnation in listed else worker.listed_at
                worker.has_lease = now - worker.listed_at < UNLISTED_S
                if not worker.has_lease and not worker.is_busy:
                    del workers[incarnation]
                    self.ledger.record("worker.left", cause=worker.record.role, worker=worker.record.name)
                    await worker.close()
        for incarnation, record in listed.items():
            if known := self.decode.get(incarnation) or self.prefill.get(incarnation):
                known.record, known.numerics = record, numerics_class(record)
            else:
                self._join(record, sessions)

    def _join(self, record: WorkerRecord, sessions: asyncio.TaskGroup) -> None:
        channel, numerics = self.connect(record.grpc_address), numerics_class(record)
        if record.role == "decode":
            stub = decode_pb2_grpc.DecodeServiceStub(channel)
            peer = SessionPeer(self.incarnation, record.incarnation, record.name)
            session = Session(stub, peer, clock=self.clock, on_change=self.note_change)
            task = sessions.create_task(session.run(), name=f"session {record.name}")
            self.decode[record.incarnation] = DecodeWorker(record, numerics, session, channel, task, self.clock.now())
        else:
            stub = prefill_pb2_grpc.PrefillServiceStub(channel)
            self.prefill[record.incarnation] = PrefillWorker(record, numerics, channel, stub, self.clock.now())
        self.ledger.record("worker.joined", cause=record.role, worker=record.name, incarnation=record.incarnation)

    def _lose_hung(self) -> None:
        """A worker whose step does not end has lost its requests, although its connection lives."""
        for worker in [*self.decode.values(), *self.prefill.values()]:
            if worker.has_lease and is_hung(worker.record):
                worker.lose("the worker makes no progress")

    async def _close_all(self) -> None:
        channels = [worker.channel for worker in [*self.decode.values(), *self.prefill.values()]]
        self.decode.clear()
        self.prefill.clear()
        for channel in channels:
            await channel.close(None)


def _status(record: WorkerRecord, *, serving: bool) -> admin_pb2.WorkerStatus:
    return admin_pb2.WorkerStatus(
        **{name: getattr(record, name) for name in _SHOWN},
        serving=serving,
        blocks=block_counts_to_proto(record.load.blocks),
        num_streams=record.load.num_streams,
        num_queued=record.load.num_queued,
        layout_fingerprint=record.layout.fingerprint,
    )
