"""A decode worker put together: what it opens beside the engine, and what it tells of itself."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence

import grpc.aio

from decode_service.core import DecodeCore
from decode_service.event_loop_post import EventLoopPost
from decode_service.move_sender import MoveSender
from decode_service.ownership_report import REFRESH_S, OwnershipReport
from decode_service.ports import DecodePorts
from decode_service.scheduler import MAX_EXTRA_ROWS
from decode_service.server import DecodeServer
from decode_service.session_requests import DecodeAddress
from decode_service.step_loop import DecodeLoop
from decode_service.step_messages import Emission, HandedOver
from decode_service.stream_table import MAX_STREAMS
from isthmus.clock import LoopClock
from isthmus.config import DecodeConfig
from isthmus.ids import Ids
from isthmus.ledger import LedgerEvent
from isthmus.process.worker_context import WorkerContext
from isthmus.steps import StepLimits
from isthmus.v1 import admin_pb2, decode_pb2_grpc
from isthmus.worker.app import WorkerApp, WorkerParts, running
from kv_transfer.counters import Counters
from kv_transfer.ownership.mirror_task import MirrorTask, mirroring
from kv_transfer.ownership.store import OpenStore, OwnershipStore
from kv_transfer.ownership.stored_handoffs import StoredHandoffs
from kv_transfer.pool_memory import RowMemory
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions, TransferEvents
from kv_transfer.sender import Sender
from kv_transfer.worker_cluster import WorkerCluster

_SWEEP_S = 0.1

Parts = WorkerParts[OwnershipStore, RowMemory]


def decode_worker(
    config: DecodeConfig, open_store: OpenStore, *, clock: LoopClock, ids: Ids
) -> WorkerApp[OwnershipStore, RowMemory]:
    context = WorkerContext.create(config, clock, ids)
    role = DecodeRole(config, context, clock, ids)
    return WorkerApp(config, context, role, WorkerCluster(config, context, open_store, ids))


class DecodeRole:
    """`isthmus.worker.app.Role`: blocks in, tokens out. The event loop's thread alone writes it."""

    service = "isthmus.v1.DecodeService"

    def __init__(self, config: DecodeConfig, context: WorkerContext, clock: LoopClock, ids: Ids):
        self._config = config
        self._context = context
        self._clock = clock
        self._ids = ids
        self._server = DecodeServer(clock)
        self._stored: StoredHandoffs | None = None
        self._report: OwnershipReport | None = None
        self._step_loop: DecodeLoop | None = None
        self._core: DecodeCore | None = None
        self._counters: list[Counters] = []

    @property
    def limits(self) -> StepLimits:
        return StepLimits(decode_rows=min(self._config.max_batch, MAX_STREAMS) + MAX_EXTRA_ROWS)

    async def stored_handoffs(self, request_id: str, transfer_ids: Sequence[str]) -> list[LedgerEvent]:
        """Nothing before the store is open."""
        return await self._stored.read(request_id, transfer_ids) if self._stored is not None else []

    def register(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self._server, server)

    @contextlib.asynccontextmanager
    async def opened(self, parts: Parts) -> AsyncIterator[None]:
        """Mirror, receiver, step loop, cores, then routers are served; the stack closes in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            self._stored = StoredHandoffs(parts.store, self._context.clock)
            mirror = MirrorTask(parts.store, self._clock, self._restate)
            await stack.enter_async_context(mirroring(mirror))
            self._report = report = OwnershipReport(mirror.report, self._context.identity.incarnation)
            post = EventLoopPost(self._clock, parts.stop)
            receiver = self._open_receiver(parts.memory, report, post)
            stack.callback(receiver.close)
            sender = MoveSender(lambda: self._open_sender(parts.memory), post)
            core = self._build_core(parts, receiver, sender, report, post)
            self._counters += [receiver.counters, mirror.counters, core.streams.counters]
            await stack.enter_async_context(running(parts.thread))
            stack.callback(sender.close)
            stack.callback(lambda: core.attachments.abandon_all(self._clock.now()))
            tending = asyncio.create_task(self._tend(core, report, post), name="attachments")
            stack.callback(tending.cancel)
            self._core = core
            self._server.open(core)
            yield

    async def drain(self, timeout_s: float) -> int:
        return await self._server.drain(timeout_s)

    def add_status(self, status: admin_pb2.GetStatusResponse) -> None:
        if self._core is not None and self._step_loop is not None:
            status.num_streams = len(self._core.streams.table)
            status.num_queued = self._step_loop.num_waiting
        for counters in self._counters:
            status.counters.update(counters.read())

    def store_lost(self) -> None:
        if self._report is not None:
            self._report.again()

    def _open_receiver(self, memory: RowMemory, report: OwnershipReport, post: EventLoopPost) -> Receiver:
        def on_ready(claim: ClaimedTransfer) -> None:
            post(lambda now: self._core and self._core.streams.claimed(claim, now))

        def on_failed(failure: FailedTransfer) -> None:
            post(lambda now: self._core and self._core.streams.failed(failure, now))

        identity = self._context.identity
        events = TransferEvents(on_ready, on_failed, on_state=report.handoff_changed)
        options = ReceiverOptions(host=self._config.host, port=self._config.zmq_port)
        receiver = Receiver(identity.incarnation, memory, self._context.ledger, events, self._clock, options).start()
        port = receiver.endpoint.rsplit(":", 1)[1]
        identity.zmq_endpoint = f"tcp://{self._config.reachable_host}:{port}"
        return receiver

    def _open_sender(self, memory: RowMemory) -> Sender:
        sender = Sender(self._context.identity.incarnation, memory, self._context.ledger, self._clock).start()
        self._counters.append(sender.counters)
        return sender

    def _build_core(
        self, parts: Parts, receiver: Receiver, sender: MoveSender, report: OwnershipReport, post: EventLoopPost
    ) -> DecodeCore:
        """The cores, and the step loop in the worker's step thread."""

        def on_step(emissions: Sequence[Emission]) -> None:
            post(lambda now: core.streams.deliver(emissions, now))

        def on_handed_over(handed_over: HandedOver) -> None:
            post(lambda now: core.mover.handed_over(handed_over, now))

        step_loop = DecodeLoop(parts.engine, self._config.max_batch, parts.instruments, on_step, on_handed_over)
        self._step_loop = step_loop
        ports = DecodePorts(receiver, sender, report, parts.thread.add(step_loop), self._ids)
        identity = self._context.identity
        address = DecodeAddress(identity.incarnation, identity.zmq_endpoint)
        core = DecodeCore.build(parts.engine, ports, parts.instruments, address, self._config.fill_timeout_s)
        return core

    def _restate(self) -> None:
        if self._core is not None:
            self._core.streams.restate()

    async def _tend(self, core: DecodeCore, report: OwnershipReport, post: EventLoopPost) -> None:
        """What is done at intervals: streams nobody came back for, and the store's memory."""
        for turn in itertools.count(1):
            await self._clock.sleep(_SWEEP_S)
            post(core.attachments.sweep)
            if turn % round(REFRESH_S / _SWEEP_S) == 0:
                report.again()
