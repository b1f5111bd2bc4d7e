"""The skeleton of a worker process: what is opened and closed in which order, and what ends it."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping

import grpc.aio
import pytest

from isthmus.clock import SystemClock
from isthmus.config import DecodeConfig, load
from isthmus.ids import SystemIds
from isthmus.kv.layout import KvLayout
from isthmus.process.worker_context import WorkerContext
from isthmus.steps import StepLimits
from isthmus.types import Place
from isthmus.v1 import admin_pb2
from isthmus.worker.app import Member, WorkerApp, WorkerParts, running

OPENED = ["store", "self-test", "role", "joined"]


class RecordingCluster:
    """A cluster of nobody; notes what happens."""

    def __init__(self, log: list[str], context: WorkerContext):
        self.joining: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._log = log
        self._context = context

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[str]:
        self._log.append("store")
        yield "the store"
        self._log.append("store closed")

    def host_memory(self, layout: KvLayout, rows: Mapping[Place, memoryview]) -> int:
        """How many places the cache has."""
        assert set(rows) == set(layout.places)
        return len(rows)

    def self_test(self, layout: KvLayout) -> None:
        self._log.append("self-test")

    @contextlib.asynccontextmanager
    async def joined(self, store: str, member: Member) -> AsyncIterator[None]:
        assert store == "the store"
        self._context.health.ready()
        self._log.append("joined")
        self.joining.set_result(member)
        yield
        self._log.append("left")


class IdleLoop:
    """A step loop that does nothing, or fails at its first command."""

    def take(self, command: str) -> None:
        raise RuntimeError(command)

    def turn(self, now: float) -> float | None:
        return None

    def close(self, now: float) -> None:
        """Nothing is here."""


class RecordingRole:
    """A role with an idle step loop; notes what happens."""

    service = "isthmus.v1.DecodeService"
    limits = StepLimits()
    stored_handoffs = None

    def __init__(self, log: list[str]):
        self.num_lost = 0
        self.parts: WorkerParts[str, int] | None = None
        self.fail = lambda _: None
        self._log = log

    def register(self, server: grpc.aio.Server) -> None:
        self._log.append("registered")

    @contextlib.asynccontextmanager
    async def opened(self, parts: WorkerParts[str, int]) -> AsyncIterator[None]:
        self.parts = parts
        self.fail = parts.thread.add(IdleLoop())
        async with running(parts.thread):
            self._log.append("role")
            yield
        self._log.append("role closed")

    async def drain(self, timeout_s: float) -> int:
        self._log.append("drained")
        return 0

    def add_status(self, status: admin_pb2.GetStatusResponse) -> None:
        status.num_streams = 7

    def store_lost(self) -> None:
        self.num_lost += 1


class World:
    """One worker of a recording role in a recording cluster, on the bundled model."""

    def __init__(self) -> None:
        self.log: list[str] = []
        config = load(DecodeConfig, [], {})
        context = WorkerContext.create(config, SystemClock(), SystemIds())
        self.role = RecordingRole(self.log)
        self.cluster = RecordingCluster(self.log, context)
        self.running = asyncio.create_task(WorkerApp(config, context, self.role, self.cluster).run())

    async def until_serving(self) -> Member:
        async with asyncio.timeout(20):
            return await self.cluster.joining

    async def end(self) -> None:
        async with asyncio.timeout(10):
            await self.running


async def test_a_worker_opens_in_the_order_of_need_and_closes_in_reverse() -> None:
    world = World()
    await world.until_serving()
    assert world.log == ["registered", *OPENED]
    os.kill(os.getpid(), signal.SIGTERM)
    await world.end()
    assert world.log[5:] == ["drained", "left", "role closed", "store closed"]


async def test_what_the_others_see_is_the_engines_part_and_the_roles() -> None:
    world = World()
    member = await world.until_serving()
    status = member.status()
    assert status.num_streams == 7
    assert status.layout.fingerprint == member.layout.fingerprint
    assert status.blocks.total > 0
    assert world.role.parts is not None
    assert world.role.parts.memory == len(member.layout.places)
    member.on_store_lost()
    assert world.role.num_lost == 1
    os.kill(os.getpid(), signal.SIGTERM)
    await world.end()


async def test_a_step_loop_that_fails_ends_the_process_without_drain() -> None:
    world = World()
    await world.until_serving()
    world.role.fail("broken")
    with pytest.raises(RuntimeError, match="broken"):
        await world.end()
    assert world.log[5:] == ["left", "role closed", "store closed"]
