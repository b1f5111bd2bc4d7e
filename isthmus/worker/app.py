"""A worker put together: what both kinds of worker open, in the order of need, and what they show of themselves.

A role brings what is its own. What moves and registers the cache lies above this package, in `kv_transfer`; so it
comes in through a port, `Cluster`, which each service's `app.py` fills.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import grpc.aio

from isthmus.config import WorkerConfig
from isthmus.engine.device_memory import DeviceMemory
from isthmus.engine.engine import Engine
from isthmus.kv.layout import KvLayout
from isthmus.process.admin import ReadStoredHandoffs, ServiceHooks
from isthmus.process.serving import Face, Stop, serve_until_signal
from isthmus.process.worker_context import WorkerContext
from isthmus.steps import StepLimits
from isthmus.types import Place
from isthmus.v1 import admin_pb2
from isthmus.worker.engine_start import device_memory, engine_status, open_engine, transfer_memory
from isthmus.worker.instruments import Instruments
from isthmus.worker.step_thread import StepThread

IDLE_WAIT_S = 0.2  # an idle step thread looks at its device so often

Store = TypeVar("Store")  # where workers are registered
Memory = TypeVar("Memory")  # what transfers read and write
MemoryMade = TypeVar("MemoryMade", covariant=True)


@dataclass(frozen=True, slots=True)
class Member:
    """A worker as the others see it. The functions may be called from any thread."""

    layout: KvLayout
    published: Callable[[], tuple[int, list[bytes]]]  # cached contents, as `BlockPool.published`
    status: Callable[[], admin_pb2.GetStatusResponse]
    on_store_lost: Callable[[], None]  # what this worker wrote there is lost or changed: say it again


class Cluster(Protocol[Store, MemoryMade]):
    """The other workers, as far as one needs them to start."""

    def connected(self) -> AbstractAsyncContextManager[Store]:
        """The store, which has answered once. Raises CannotStart when it does not for a while."""
        ...

    def host_memory(self, layout: KvLayout, rows: Mapping[Place, memoryview]) -> MemoryMade:
        """A cache whose bytes are this process's, by (plane, layer), as transfers take it."""
        ...

    def self_test(self, layout: KvLayout) -> None:
        """Sends some blocks to itself over the real path. Blocks the caller; raises when they do not arrive."""
        ...

    def joined(self, store: Store, member: Member) -> AbstractAsyncContextManager[None]:
        """Within the block the worker is registered; it serves as soon as it fits the others."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerParts(Generic[Store, Memory]):
    """What is open when a role opens its own parts."""

    store: Store
    engine: Engine
    memory: Memory | DeviceMemory
    thread: StepThread  # not started; `running` starts it
    instruments: Instruments
    stop: Callable[[BaseException | None], None]  # ends the process; with an error: without drain


class Role(Protocol[Store, Memory]):
    """What makes a worker a prefill or a decode worker. Its gRPC face answers from the first moment."""

    @property
    def service(self) -> str:
        """The full name of its gRPC service."""
        ...

    @property
    def limits(self) -> StepLimits: ...

    @property
    def stored_handoffs(self) -> ReadStoredHandoffs | None:
        """Reads what the store holds of transfers; None: it does not look there."""
        ...

    def register(self, server: grpc.aio.Server) -> None: ...

    def opened(self, parts: WorkerParts[Store, Memory]) -> AbstractAsyncContextManager[None]:
        """Within the block it takes requests; the worker has passed its self-test and is not registered yet."""
        ...

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests; returns how many are left at the end. Works from the start."""
        ...

    def add_status(self, status: admin_pb2.GetStatusResponse) -> None:
        """Its own part, as far as there is something to tell. Any thread."""
        ...

    def store_lost(self) -> None:
        """What this worker wrote into the store is lost or changed. Any thread."""
        ...


class WorkerApp(Generic[Store, Memory]):
    """One worker process; runs once. The event loop's thread alone writes it."""

    def __init__(
        self,
        config: WorkerConfig,
        context: WorkerContext,
        role: Role[Store, Memory],
        cluster: Cluster[Store, Memory],
    ):
        self._config = config
        self._context = context
        self._role = role
        self._cluster = cluster
        self._engine: Engine | None = None

    async def run(self) -> None:
        """Returns after a drain; raises CannotStart when a setting is in the way."""
        hooks = ServiceHooks(
            self._status, self._role.drain, self._context.ledger, self._context.metrics, self._role.stored_handoffs
        )
        face = Face(
            config=self._config,
            identity=self._context.identity,
            health=self._context.health,
            hooks=hooks,
            clock=self._context.clock,
            service=self._role.service,
            register=self._role.register,
        )
        await serve_until_signal(face, self._work)

    @contextlib.asynccontextmanager
    async def _work(self, stop: Stop) -> AsyncIterator[None]:
        """Opens everything in the order of need; the stack closes it in reverse."""
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(self._cluster.connected())
            tell = self._context.health.starting
            engine = await asyncio.to_thread(open_engine, self._config, tell, self._role.limits)
            self._engine = engine
            memory = await asyncio.to_thread(self._open_memory, engine)
            await asyncio.to_thread(self._cluster.self_test, engine.layout)
            parts = self._parts(store, engine, memory, stop)
            await stack.enter_async_context(self._role.opened(parts))
            member = Member(engine.layout, engine.pool.published, self._status, self._role.store_lost)
            await stack.enter_async_context(self._cluster.joined(store, member))
            yield

    def _open_memory(self, engine: Engine) -> Memory | DeviceMemory:
        return device_memory(engine) or self._cluster.host_memory(engine.layout, transfer_memory(engine))

    def _parts(
        self, store: Store, engine: Engine, memory: Memory | DeviceMemory, stop: Stop
    ) -> WorkerParts[Store, Memory]:
        context = self._context
        thread = StepThread(f"{self._config.role}-step", context.clock, idle_wait_s=IDLE_WAIT_S, on_crash=stop.request)
        instruments = Instruments(context.ledger, context.failpoints, context.progress)
        return WorkerParts(store, engine, memory, thread, instruments, stop.request)

    def _status(self) -> admin_pb2.GetStatusResponse:
        status = engine_status(self._config.model, self._engine)
        self._role.add_status(status)
        return status


@contextlib.asynccontextmanager
async def running(thread: StepThread) -> AsyncGenerator[None]:
    """The thread runs within the block; it ends after the step it computes."""
    thread.start()
    try:
        yield
    finally:
        await asyncio.to_thread(thread.stop)
