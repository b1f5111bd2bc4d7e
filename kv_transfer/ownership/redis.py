"""Ownership in Redis. Keys, and nothing else:

    w:{incarnation}       string, JSON of WorkerRecord: the lease, PX ttl
    blocks:{incarnation}  string, uint64 sequence + packed 16-byte hashes; lives as long as the lease
    handoff:{transfer}    hash: state, request_id, decode, prefill, attempt, ttl_ms; deleted by a final state
    stream:{request}      string, incarnation of the decode worker that holds it

Leases are read by routers and by workers that join, stream hints by routers that resume, handoffs for `isthmus
explain`. Block snapshots have no reader but tests today: the cluster-wide prefix cache, which comes later, reads them.

A block snapshot is one versioned value, replaced whole: at most 1 MiB, no deltas to lose. Every atomic change is one
Lua file in `lua/`. No command waits longer than `timeout_s`, which a server that is 500 ms away can keep.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import redis.asyncio
from redis.exceptions import RedisError, ResponseError

from kv_transfer.counters import Counters
from kv_transfer.ownership import records
from kv_transfer.ownership.handoff import TRANSITIONS
from kv_transfer.ownership.store import (
    SEQUENCE_BYTES,
    BlockSnapshot,
    HandoffRecord,
    Renewed,
    StoreRefused,
    StoreUnavailable,
    Transition,
    TransitionResult,
    WorkerRecord,
)

Answer = TypeVar("Answer")
Raw = TypeVar("Raw")

_MAX_CONNECTIONS = 8
_MAX_WORKERS = 4096  # leases read at most; a hostile writer cannot make a listing endless
_SCAN_KEYS = 10_000  # looked at in one round trip
_LUA = Path(__file__).with_name("lua")
_TRANSITION_TABLE = " " + " ".join(f"{a.value}>{b.value}" for a, after in TRANSITIONS.items() for b in after) + " "


class _Connection:
    """Commands with a bound in time. A command survives its caller's cancellation, or dies with its connection
    (CVE-2023-28858: a connection left one answer behind gives the next caller somebody else's data)."""

    def __init__(self, url: str, timeout_s: float):
        self.counters = Counters()
        self._timeout_s = timeout_s
        self._in_flight: set[asyncio.Task[Any]] = set()
        # Any: the library's command types cannot say that nothing is decoded.
        self.client: Any = redis.asyncio.Redis.from_pool(
            redis.asyncio.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=timeout_s,  # for a free connection
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                protocol=2,  # the handshake of 3 costs two round trips more
            )
        )

    def script(self, name: str) -> Any:
        return self.client.register_script((_LUA / f"{name}.lua").read_text())

    async def run(self, command: Awaitable[Answer]) -> Answer:
        """In a task of its own, so that a cancelled caller never tears a connection out of step."""
        task = asyncio.ensure_future(command)
        self._in_flight.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.wait_for(asyncio.shield(task), self._timeout_s)
        except TimeoutError as error:
            task.cancel()  # redis-py closes the connection of a command that was cancelled
            self.counters.add("unavailable")
            raise StoreUnavailable(f"no answer from Redis within {self._timeout_s} s") from error
        except (RedisError, OSError) as error:
            if type(error) is ResponseError:  # its subclasses are the server's troubles: read-only, out of memory
                self.counters.add("refused")
                raise StoreRefused(f"Redis: {error}"[:200]) from error
            self.counters.add("unavailable")
            raise StoreUnavailable(f"Redis: {type(error).__name__}") from error

    async def read(self, kind: str, decode: Callable[[Raw], Answer], command: Awaitable[Raw | None]) -> Answer | None:
        """None for no value, and for one of a type or content that makes no sense, which is counted."""
        try:
            raw = await self.run(command)
        except StoreRefused:
            self.counters.add(f"bad_record.{kind}")
            return None
        return records.read_record(kind, decode, raw or None, self.counters)

    async def close(self) -> None:
        """Commands left by cancelled callers end first, within their own bound."""
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=self._timeout_s)
        await self.client.aclose()

    def _forget(self, task: "asyncio.Task[Any]") -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # seen here when the caller has gone


class RedisBlocks:
    """BlockIndex."""

    def __init__(self, connection: _Connection):
        self._connection = connection

    async def publish(self, incarnation: str, snapshot: BlockSnapshot, ttl_s: float) -> None:
        name = f"blocks:{incarnation}"
        value = records.encode_blocks(snapshot)
        await self._connection.run(self._connection.client.set(name, value, px=_milliseconds(ttl_s)))

    async def find(self, incarnation: str) -> BlockSnapshot | None:
        command = self._connection.client.get(f"blocks:{incarnation}")
        return await self._connection.read("blocks", records.decode_blocks, command)


class RedisStreams:
    """StreamHints."""

    def __init__(self, connection: _Connection):
        self._connection = connection
        self._drop = connection.script("drop_stream")

    async def put(self, request_id: str, decode: str, ttl_s: float) -> None:
        command = self._connection.client.set(f"stream:{request_id}", decode, px=_milliseconds(ttl_s))
        await self._connection.run(command)

    async def drop(self, request_id: str, decode: str) -> bool:
        return bool(await self._connection.run(self._drop(keys=[f"stream:{request_id}"], args=[decode])))

    async def find(self, request_id: str) -> str | None:
        command = self._connection.client.get(f"stream:{request_id}")
        return await self._connection.read("stream", records.decode_stream, command)


class RedisOwnership:
    """One event loop. Connects at the first command."""

    def __init__(self, url: str, *, timeout_s: float = 1.5):
        self._connection = _Connection(url, timeout_s)
        self.counters = self._connection.counters
        self.blocks = RedisBlocks(self._connection)
        self.streams = RedisStreams(self._connection)
        self._begin_handoff = self._connection.script("begin_handoff")
        self._advance_handoff = self._connection.script("advance_handoff")

    async def put_worker(self, record: WorkerRecord, ttl_s: float) -> Renewed:
        lease = f"w:{record.incarnation}"
        blocks = f"blocks:{record.incarnation}"
        ttl_ms = _milliseconds(ttl_s)

        async def put() -> list[Any]:
            async with self._connection.client.pipeline(transaction=False) as pipe:
                pipe.get(lease).getrange(blocks, 0, SEQUENCE_BYTES - 1).strlen(blocks)
                pipe.pexpire(blocks, ttl_ms).set(lease, records.encode_worker(record), px=ttl_ms)
                *found, written = await pipe.execute(raise_on_error=False)
            if isinstance(written, Exception):
                raise written
            return [None if isinstance(reply, Exception) else reply for reply in found]  # a key of another type

        known, head, num_bytes, _ = await self._connection.run(put())
        decode = partial(records.decode_worker, incarnation=record.incarnation)
        before = records.read_record("worker", decode, known, self.counters)
        return Renewed(before, records.decode_stamp(head or b"", num_bytes or 0))

    async def drop_worker(self, incarnation: str) -> None:
        await self._connection.run(self._connection.client.delete(f"w:{incarnation}", f"blocks:{incarnation}"))

    async def list_workers(self) -> list[WorkerRecord]:
        names = await self._connection.run(self._scan_workers())
        values = await self._connection.run(self._connection.client.mget(names)) if names else []
        found = zip(names, values, strict=True)
        raw = ((name.decode(errors="replace")[2:], value) for name, value in found if value is not None)
        return records.read_workers(raw, self.counters)

    async def begin_handoff(self, record: HandoffRecord, ttl_s: float) -> TransitionResult:
        owners = [record.state.value, record.request_id, record.decode, record.prefill or ""]
        arguments = [*owners, record.attempt, _milliseconds(ttl_s)]
        command = self._begin_handoff(keys=[f"handoff:{record.transfer_id}"], args=arguments)
        return TransitionResult(await self._connection.run(command))

    async def advance_handoff(self, transition: Transition) -> TransitionResult:
        before = transition.from_state
        after = transition.to_state
        writer = [transition.attempt, transition.prefill or ""]
        arguments = [before.value, after.value, *writer, _TRANSITION_TABLE, int(after.is_final)]
        command = self._advance_handoff(keys=[f"handoff:{transition.transfer_id}"], args=arguments)
        return TransitionResult(await self._connection.run(command))

    async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
        command = self._connection.client.hgetall(f"handoff:{transfer_id}")
        decode = partial(records.decode_handoff, transfer_id=transfer_id)
        return await self._connection.read("handoff", decode, command)

    async def ping(self) -> None:
        await self._connection.run(self._connection.client.ping())

    async def close(self) -> None:
        await self._connection.close()

    async def _scan_workers(self) -> list[bytes]:
        names: dict[bytes, None] = {}  # a scan may name a key twice
        async for name in self._connection.client.scan_iter(match="w:*", count=_SCAN_KEYS):
            names[name] = None
            if len(names) == _MAX_WORKERS:
                break
        return list(names)


def _milliseconds(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))
