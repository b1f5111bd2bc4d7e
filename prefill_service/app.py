"""A prefill worker put together: engine, sender, prefill loop, lease, and what it shows of itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from isthmus.config import PrefillConfig
from isthmus.engine.engine import Engine
from isthmus.ids import SystemIds
from isthmus.log import get_logger
from isthmus.process.admin import ServiceHooks
from isthmus.process.serving import Face, Stop, serve_until_signal
from isthmus.process.worker_context import WorkerContext
from isthmus.v1 import admin_pb2, prefill_pb2_grpc
from isthmus.worker.engine_start import device_memory, engine_status, open_engine, transfer_memory
from kv_transfer.ownership.membership import Membership
from kv_transfer.ownership.store import OpenStore, connected
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.selftest import round_trip
from kv_transfer.sender import Sender
from kv_transfer.sender_options import SenderOptions
from prefill_service.server import PrefillServer
from prefill_service.tile_budget import measure_tile_budget, step_limits
from prefill_service.worker import PrefillLoop

SERVICE = "isthmus.v1.PrefillService"
log = get_logger("prefill.app")


class PrefillWorker:
    """The process's composition root; runs once."""

    def __init__(self, config: PrefillConfig, open_store: OpenStore):
        self._config = config
        self._open_store = open_store
        self._context = WorkerContext.create(config)
        self._identity = self._context.identity
        self._server = PrefillServer(self._context.clock)
        self._engine: Engine | None = None
        self._sender: Sender | None = None
        self._prefill_loop: PrefillLoop | None = None

    async def run(self) -> None:
        """Returns after a drain; raises CannotStart when a setting is in the way."""
        hooks = ServiceHooks(self._status, self._server.drain, self._context.ledger, self._context.metrics)
        register = partial(prefill_pb2_grpc.add_PrefillServiceServicer_to_server, self._server)
        face = Face(self._config, self._identity, self._context.health, hooks, SERVICE, register)
        await serve_until_signal(face, self._work)

    @contextlib.asynccontextmanager
    async def _work(self, stop: Stop) -> AsyncIterator[None]:
        """Opens everything in the order of need; the stack closes it in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(connected(self._open_store, self._config))
            limits = step_limits(self._config.device, self._config.tile_budget)
            tell = self._context.health.starting
            engine = self._engine = await asyncio.to_thread(open_engine, self._config, tell, limits)
            on_device = await asyncio.to_thread(device_memory, engine)
            memory = on_device or PoolMemory(engine.layout, transfer_memory(engine))
            options = SenderOptions(failpoints=self._context.failpoints)
            ledger, clock = self._context.ledger, self._context.clock
            sender = Sender(self._identity.incarnation, memory, ledger, clock, options=options).start()
            self._sender = sender
            stack.callback(sender.close)
            tile_budget = self._config.tile_budget or await asyncio.to_thread(self._measure_tile_budget, engine)
            prefill_loop = self._prefill_loop = PrefillLoop(engine, sender, self._context, tile_budget, stop.request)
            prefill_loop.start()
            stack.push_async_callback(asyncio.to_thread, prefill_loop.stop)
            await asyncio.to_thread(round_trip, engine.layout, self._context.clock, SystemIds())
            self._server.open(prefill_loop, engine)
            member = Membership(self._config, self._context, self._status, self._open_store)
            await stack.enter_async_context(member.join(store, engine.layout, engine.pool.published))
            yield

    def _measure_tile_budget(self, engine: Engine) -> int:
        tile_budget = measure_tile_budget(engine)
        log.info("tile_budget.chosen", tile_budget=tile_budget)
        self._context.ledger.record("tile_budget.chosen", tile_budget=tile_budget)
        return tile_budget

    def _status(self) -> admin_pb2.GetStatusResponse:
        status = engine_status(self._config.model, self._engine)
        if self._prefill_loop is not None and self._sender is not None:
            status.num_streams = self._server.num_calls
            status.num_queued = self._prefill_loop.num_queued
            status.counters.update(self._sender.counters.read())
        return status
