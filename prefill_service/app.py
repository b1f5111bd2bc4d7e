"""A prefill worker put together: what it opens beside the engine, and what it tells of itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio

from isthmus.clock import LoopClock
from isthmus.config import PrefillConfig
from isthmus.engine.engine import Engine
from isthmus.ids import Ids
from isthmus.log import get_logger
from isthmus.process.worker_context import WorkerContext
from isthmus.steps import StepLimits
from isthmus.v1 import admin_pb2, prefill_pb2_grpc
from isthmus.worker.app import WorkerApp, WorkerParts, running
from kv_transfer.ownership.store import OpenStore, OwnershipStore
from kv_transfer.pool_memory import RowMemory
from kv_transfer.sender import Sender
from kv_transfer.sender_options import SenderOptions
from kv_transfer.worker_cluster import WorkerCluster
from prefill_service.ports import LoopPorts
from prefill_service.prefill_loop import PrefillLoop
from prefill_service.server import PrefillServer
from prefill_service.submissions import Submissions
from prefill_service.tile_budget import measure_tile_budget, step_limits

log = get_logger("prefill.app")


def prefill_worker(
    config: PrefillConfig, open_store: OpenStore, *, clock: LoopClock, ids: Ids
) -> WorkerApp[OwnershipStore, RowMemory]:
    context = WorkerContext.create(config, clock, ids)
    return WorkerApp(config, context, PrefillRole(config, context), WorkerCluster(config, context, open_store, ids))


class PrefillRole:
    """`isthmus.worker.app.Role`: prompts in, blocks out. The event loop's thread alone writes it."""

    service = "isthmus.v1.PrefillService"

    def __init__(self, config: PrefillConfig, context: WorkerContext):
        self._config = config
        self._context = context
        self._server = PrefillServer(context.clock)
        self._submissions: Submissions | None = None
        self._sender: Sender | None = None

    @property
    def limits(self) -> StepLimits:
        return step_limits(self._config.device, self._config.tile_budget)

    @property
    def stored_handoffs(self) -> None:
        """It looks at no handoffs in the store."""
        return None

    def register(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self._server, server)

    @contextlib.asynccontextmanager
    async def opened(self, parts: WorkerParts[OwnershipStore, RowMemory]) -> AsyncIterator[None]:
        """Sender, prefill loop, then prompts are taken; the stack closes in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            sender = self._open_sender(parts.memory)
            stack.callback(sender.close)
            tile_budget = self._config.tile_budget or await asyncio.to_thread(self._measure_tile_budget, parts.engine)
            ports = LoopPorts(parts.engine, sender, self._context.clock.now, parts.instruments)
            prefill_loop = PrefillLoop(ports, tile_budget)
            submissions = Submissions(parts.engine, prefill_loop, parts.thread.add(prefill_loop))
            await stack.enter_async_context(running(parts.thread))
            self._sender = sender
            self._submissions = submissions
            self._server.open(submissions)
            yield

    async def drain(self, timeout_s: float) -> int:
        return await self._server.drain(timeout_s)

    def add_status(self, status: admin_pb2.GetStatusResponse) -> None:
        if self._submissions is not None and self._sender is not None:
            status.num_streams = self._server.num_calls
            status.num_queued = self._submissions.num_queued
            status.counters.update(self._sender.counters.read())

    def store_lost(self) -> None:
        """A prefill worker has nothing in the store but its lease, which renews itself."""

    def _open_sender(self, memory: RowMemory) -> Sender:
        options = SenderOptions(failpoints=self._context.failpoints)
        context = self._context
        return Sender(context.identity.incarnation, memory, context.ledger, context.clock, options=options).start()

    def _measure_tile_budget(self, engine: Engine) -> int:
        tile_budget = measure_tile_budget(engine, self._context.clock.now)
        log.info("tile_budget.chosen", tile_budget=tile_budget)
        self._context.ledger.record("tile_budget.chosen", tile_budget=tile_budget)
        return tile_budget
