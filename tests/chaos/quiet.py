"""A stack without work: what it may still hold is nothing, in the workers' memory, in the tables, in Redis."""

import contextlib
from collections.abc import AsyncIterator

import grpc.aio
import redis.asyncio

from isthmus.testing.processes import left_over, statuses
from isthmus.testing.stack import Stack, until


async def until_quiet(stack: Stack, timeout_s: float, *, max_ttl_s: float = 0.0) -> None:
    """Raises AssertionError naming what is still held at the end of the time.

    Keys of requests that go by themselves within `max_ttl_s` are no offence: a killed process cannot delete its own.
    """
    held: list[str] = []

    async def quiet() -> bool:
        try:
            held[:] = left_over(await statuses(stack)) + await request_keys(stack, max_ttl_s)
        except (grpc.aio.AioRpcError, redis.asyncio.RedisError) as error:
            held[:] = [repr(error)]
        return not held

    try:
        await until(quiet, timeout_s, "quiet")
    except AssertionError:
        raise AssertionError(f"{timeout_s:g} s after the last stream there is left: {held}") from None


async def all_met(stack: Stack) -> None:
    """Every router serves with every worker: from then on a count of tasks can be compared with a later one."""
    num_workers = len(stack.services("prefill")) + len(stack.services("decode"))

    async def met() -> bool:
        routers = [seen for name, seen in (await statuses(stack)).items() if name.startswith("router")]
        return all(sum(worker.serving for worker in seen.workers) == num_workers for seen in routers)

    await until(met, 20, "the routers know every worker")


async def num_tasks(stack: Stack) -> dict[str, int]:
    """asyncio tasks of every service by name."""
    return {name: seen.num_tasks for name, seen in (await statuses(stack)).items()}


async def request_keys(stack: Stack, max_ttl_s: float) -> list[str]:
    """Redis keys that are to go with their request, but for those with at most so much time left."""
    async with opened_redis(stack) as client:
        left_ms = {key.decode(errors="replace"): await client.pttl(key) async for key in client.scan_iter(count=1000)}
    named = {key: ms for key, ms in left_ms.items() if key.startswith(("handoff:", "stream:"))}
    return [f"key {key}, {ms} ms left" for key, ms in named.items() if ms == -1 or ms > 1000 * max_ttl_s]


@contextlib.asynccontextmanager
async def opened_redis(stack: Stack) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.from_url(stack.redis_url, socket_timeout=5) as client:
        yield client
