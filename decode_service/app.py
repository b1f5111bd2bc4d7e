"""A decode worker put together: engine, receiver, step loop, lease, and what it shows of itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TypeVar

from decode_service.ownership_report import OwnershipReport
from decode_service.server import DecodeServer
from decode_service.streams import Streams
from decode_service.worker import StepLoop
from isthmus.admin import ServiceHooks
from isthmus.config import DecodeConfig
from isthmus.engine.engine import Engine
from isthmus.serving import Face, Stop, serve_until_signal
from isthmus.v1 import admin_pb2, decode_pb2_grpc
from isthmus.worker_context import WorkerContext
from isthmus.worker_engine import engine_status, open_engine, transfer_memory
from kv_transfer.counters import Counters
from kv_transfer.events import ReceiverOptions, TransferEvents
from kv_transfer.membership import Membership, running
from kv_transfer.mirror import HandoffMirror
from kv_transfer.ownership import OpenStore, connected
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.selftest import round_trip

SERVICE = "isthmus.v1.DecodeService"
_T = TypeVar("_T")


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
        hooks = ServiceHooks(self._status, self._drain, self._context.ledger, self._context.metrics)
        register = partial(decode_pb2_grpc.add_DecodeServiceServicer_to_server, self._server)
        face = Face(self._config, self._identity, self._context.health, hooks, SERVICE, register)
        await serve_until_signal(face, self._work)

    @contextlib.asynccontextmanager
    async def _work(self, stop: Stop) -> AsyncIterator[None]:
        """Opens everything in the order of need; the stack closes it in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(connected(self._open_store, self._config))
            engine = self._engine = await asyncio.to_thread(open_engine, self._config, self._context.health.starting)
            memory = PoolMemory(engine.layout, transfer_memory(engine))
            mirror = await stack.enter_async_context(running(HandoffMirror(store)))
            report = OwnershipReport(mirror, self._identity.incarnation)
            loop = asyncio.get_running_loop()
            receiver = self._open_receiver(memory, report, loop)
            stack.callback(receiver.close)
            self._counters = [receiver.counters, mirror.counters]
            step_loop = StepLoop(
                engine,
                self._config.max_batch,
                self._context,
                on_step=_in_loop(loop, lambda emissions: streams.deliver(emissions)),
            )
            streams = self._streams = Streams(
                engine,
                receiver,
                step_loop,
                self._context,
                report=report,
                fill_timeout_s=self._config.fill_timeout_s,
            )
            step_loop.start()
            stack.push_async_callback(asyncio.to_thread, step_loop.stop)
            stack.callback(streams.end_all, "the decode worker stops")
            await asyncio.to_thread(round_trip, engine.layout)
            self._server.open(streams)
            member = Membership(self._config, self._context, self._status, self._open_store)
            await stack.enter_async_context(member.join(store, engine.layout, engine.pool.published))
            yield

    def _open_receiver(self, memory: PoolMemory, report: OwnershipReport, loop: asyncio.AbstractEventLoop) -> Receiver:
        events = TransferEvents(
            on_ready=_in_loop(loop, lambda claim: self._streams and self._streams.claimed(claim)),
            on_failed=_in_loop(loop, lambda failure: self._streams and self._streams.failed(failure)),
            on_state=report.handoff_changed,
        )
        options = ReceiverOptions(host=self._config.host, port=self._config.zmq_port)
        receiver = Receiver(self._identity.incarnation, memory, self._context.ledger, events, options=options)
        port = receiver.endpoint.rsplit(":", 1)[1]
        self._identity.zmq_endpoint = f"tcp://{self._config.reachable_host}:{port}"
        return receiver

    def _status(self) -> admin_pb2.GetStatusResponse:
        status = engine_status(self._config.model, self._engine)
        if self._streams is not None:
            status.num_streams = len(self._streams)
            status.num_queued = self._streams.step_loop.num_waiting
        for counters in self._counters:
            status.counters.update(counters.read())
        return status

    async def _drain(self, timeout_s: float) -> int:
        """Refuses new streams and waits for the running ones; how many are left."""
        return 0 if self._streams is None else await self._streams.drain(timeout_s)


def _in_loop(loop: asyncio.AbstractEventLoop, function: Callable[[_T], object]) -> Callable[[_T], None]:
    """`function` as other threads may call it; after the loop's end it does nothing."""

    def call(argument: _T) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop.call_soon_threadsafe(function, argument)

    return call
