"""A decode worker put together: engine, receiver, step loop, lease, and what it shows of itself."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from functools import partial

from decode_service.attachment import Attachments
from decode_service.moving import Mover
from decode_service.ownership_report import REFRESH_S, OwnershipReport
from decode_service.scheduler import REPLAY_ROWS
from decode_service.server import DecodeServer
from decode_service.stream import Emission
from decode_service.streams import MAX_STREAMS, Streams
from decode_service.worker import StepLoop
from isthmus.config import DecodeConfig
from isthmus.engine.engine import Engine, StepLimits
from isthmus.ids import SystemIds
from isthmus.process.admin import ServiceHooks
from isthmus.process.serving import Face, Stop, serve_until_signal
from isthmus.process.worker_context import WorkerContext
from isthmus.v1 import admin_pb2, decode_pb2_grpc
from isthmus.worker.engine_start import device_memory, engine_status, open_engine, transfer_memory
from kv_transfer.counters import Counters
from kv_transfer.ownership.membership import Membership, running
from kv_transfer.ownership.mirror import HandoffMirror
from kv_transfer.ownership.store import OpenStore, connected
from kv_transfer.pool_memory import PoolMemory, RowMemory
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ReceiverOptions, TransferEvents
from kv_transfer.selftest import round_trip
from kv_transfer.sender import Sender

SERVICE = "isthmus.v1.DecodeService"
_SWEEP_S = 0.1


class DecodeWorker:
    """The process's composition root; runs once."""

    def __init__(self, config: DecodeConfig, open_store: OpenStore):
        self._config = config
        self._open_store = open_store
        self._context = WorkerContext.create(config)
        self._identity = self._context.identity
        self._server = DecodeServer(self._identity)
        self._engine: Engine | None = None
        self._streams: Streams | None = None
        self._counters: list[Counters] = []

    async def run(self) -> None:
        """Returns after a drain; raises CannotStart when a setting is in the way."""
        hooks = ServiceHooks(self._status, self._server.drain, self._context.ledger, self._context.metrics)
        register = partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, self._server)
        face = Face(self._config, self._identity, self._context.health, hooks, SERVICE, register)
        await serve_until_signal(face, self._work)

    @contextlib.asynccontextmanager
    async def _work(self, stop: Stop) -> AsyncIterator[None]:
        """Opens everything in the order of need; the stack closes it in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(connected(self._open_store, self._config))
            limits = StepLimits(decode_rows=min(self._config.max_batch, MAX_STREAMS) + REPLAY_ROWS)
            tell = self._context.health.starting
            engine = self._engine = await asyncio.to_thread(open_engine, self._config, tell, limits)
            on_device = await asyncio.to_thread(device_memory, engine)
            memory = on_device or PoolMemory(engine.layout, transfer_memory(engine))
            mirror = await stack.enter_async_context(running(HandoffMirror(store)))
            report = OwnershipReport(mirror, self._identity.incarnation)
            post = _Post(stop)
            receiver = self._open_receiver(memory, report, post)
            stack.callback(receiver.close)
            streams = self._streams = self._open_streams(engine, receiver, report, post, stop)
            stack.push_async_callback(asyncio.to_thread, streams.step_loop.stop)
            self._counters = [receiver.counters, mirror.counters, streams.counters]
            mover = Mover(streams, partial(self._open_sender, memory), post)
            stack.callback(mover.close)
            attachments = Attachments(streams)
            stack.callback(attachments.abandon_all)
            await asyncio.to_thread(round_trip, engine.layout, self._context.clock, SystemIds())
            self._server.open(attachments, mover)
            tending = asyncio.create_task(_tend(attachments, report, post), name="attachments")
            stack.callback(tending.cancel)
            repeat = partial(report.again, streams.restate)
            member = Membership(self._config, self._context, self._status, self._open_store, on_store_lost=repeat)
            await stack.enter_async_context(member.join(store, engine.layout, engine.pool.published))
            yield

    def _open_receiver(self, memory: RowMemory, report: OwnershipReport, post: "_Post") -> Receiver:
        events = TransferEvents(
            on_ready=lambda claim: post(lambda: self._streams and self._streams.claimed(claim)),
            on_failed=lambda failure: post(lambda: self._streams and self._streams.failed(failure)),
            on_state=report.handoff_changed,
        )
        options = ReceiverOptions(host=self._config.host, port=self._config.zmq_port)
        context = self._context
        receiver = Receiver(self._identity.incarnation, memory, context.ledger, events, context.clock, options).start()
        port = receiver.endpoint.rsplit(":", 1)[1]
        self._identity.zmq_endpoint = f"tcp://{self._config.reachable_host}:{port}"
        return receiver

    def _open_streams(
        self, engine: Engine, receiver: Receiver, report: OwnershipReport, post: "_Post", stop: Stop
    ) -> Streams:
        def on_step(emissions: list[Emission]) -> None:
            post(lambda: streams.deliver(emissions))

        step_loop = StepLoop(engine, self._config.max_batch, self._context, on_step, stop.request)
        streams = Streams(engine, receiver, step_loop, self._context, report, self._config.fill_timeout_s)
        step_loop.start()
        return streams

    def _open_sender(self, memory: RowMemory) -> Sender:
        sender = Sender(self._identity.incarnation, memory, self._context.ledger, self._context.clock).start()
        self._counters.append(sender.counters)
        return sender

    def _status(self) -> admin_pb2.GetStatusResponse:
        status = engine_status(self._config.model, self._engine)
        if self._streams is not None:
            status.num_streams = len(self._streams)
            status.num_queued = self._streams.step_loop.num_waiting
        for counters in self._counters:
            status.counters.update(counters.read())
        return status


class _Post:
    """Brings calls from any thread into the event loop. One that fails ends the process: its streams go on elsewhere,
    which is better than one that nobody looks after here. After the loop's end it does nothing."""

    def __init__(self, stop: Stop):
        self._loop = asyncio.get_running_loop()
        self._stop = stop

    def __call__(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._run, function)

    def _run(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - the root of what other threads have done
            self._stop.request(error)


async def _tend(attachments: Attachments, report: OwnershipReport, post: _Post) -> None:
    """What is done at intervals: streams nobody came back for, and the store's memory."""
    for turn in itertools.count(1):
        await asyncio.sleep(_SWEEP_S)
        post(attachments.sweep)
        if turn % round(REFRESH_S / _SWEEP_S) == 0:
            report.again(attachments.streams.restate)
