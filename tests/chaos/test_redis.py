"""Redis flushed, rolled back, filled with garbage or stopped under load: no stream and no new request notices."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import pytest_asyncio

from isthmus.testing.stack import Stack, running_stack
from tests.chaos.faults import Injected
from tests.chaos.history import Oracle
from tests.chaos.quiet import opened_redis
from tests.chaos.unharmed import unharmed_load

FLUSH_EVERY_S = float(os.environ.get("CHAOS_FLUSH_EVERY", "3"))
FLUSHING_S = float(os.environ.get("CHAOS_FLUSHING", "18"))
STOPPED_S = float(os.environ.get("CHAOS_REDIS_STOPPED", "10"))
NUM_USERS = 8
STRANGERS = ("w:" + "ab" * 16, "w:" + "cd" * 16, "w:", "blocks:nobody")

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(FLUSHING_S + 6 * STOPPED_S + 120)]


@pytest.fixture(scope="module")
def running() -> Iterator[Stack]:
    with running_stack("--prefill", "2", "--decode", "2") as stack:
        yield stack


@pytest_asyncio.fixture
async def stack(running: Stack) -> AsyncIterator[Stack]:
    """Without the keys that an earlier test left in Redis."""
    await flush(running)
    yield running


async def flush(stack: Stack) -> None:
    async with opened_redis(stack) as client:
        await client.flushall()


async def garbage(stack: Stack) -> None:
    """Every value is replaced by bytes that mean nothing, of another type; a stranger's lease appears."""
    async with opened_redis(stack) as client:
        for key in await client.keys("*"):
            await client.set(key, b"\xff\x00garbage", ex=5)
        await client.delete(*STRANGERS)
        await client.hset(STRANGERS[0], mapping={"role": "decode", "grpc": "127.0.0.1:1", "load": "\x00"})
        for key in STRANGERS[1:]:
            await client.set(key, b"\x01" * 1000)
        for key in STRANGERS:
            await client.expire(key, 5)


async def roll_back(stack: Stack) -> None:
    """To what it held two seconds ago, as a failover to a lagging replica does."""
    async with opened_redis(stack) as client:
        old = {key: (await client.dump(key), await client.pttl(key)) for key in await client.keys("*")}
        await asyncio.sleep(2.0)
        await client.flushall()
        for key, (value, ttl_ms) in old.items():
            if value is not None:
                # A worker may have written the key anew since the flush: the old value wins, as on a lagging replica.
                await client.restore(key, max(ttl_ms, 0), value, replace=True)


@pytest.mark.parametrize("harm", [flush, garbage, roll_back])
async def test_redis_loses_what_it_knew_again_and_again(
    stack: Stack, expected: dict[str, Oracle], harm: Callable[[Stack], Awaitable[None]]
) -> None:
    seconds = FLUSHING_S if harm is flush else FLUSHING_S / 2
    async with unharmed_load(stack, expected, num_users=NUM_USERS) as run:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            run.faults.append(Injected(harm.__name__, "redis", time.monotonic()))
            await harm(stack)
            run.faults[-1].served_at = time.monotonic()
            await asyncio.sleep(FLUSH_EVERY_S)


async def test_redis_stands_still_for_long(stack: Stack, expected: dict[str, Oracle]) -> None:
    async with unharmed_load(stack, expected, num_users=NUM_USERS) as run:
        run.faults.append(Injected("stop", "redis", time.monotonic()))
        stack.send("redis", signal.SIGSTOP)
        try:
            await asyncio.sleep(STOPPED_S)
        finally:
            stack.send("redis", signal.SIGCONT)
        run.faults[-1].served_at = time.monotonic()
        await asyncio.sleep(2.0)  # leases return while streams run
