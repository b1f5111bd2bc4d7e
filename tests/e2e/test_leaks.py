"""200 mixed requests at concurrency 32 with random cancels: afterwards everything is as it was before."""

import asyncio
import contextlib
import random

import redis.asyncio

from isthmus.testing.stack import Stack, StackClient, request, status, until
from tests.e2e.prompts import TEXT_PROMPTS

# Tasks, threads, descriptors. A busy machine makes gRPC open another poller (threads and 7 descriptors, kept for good);
# a leak per request or per cancel would be ten times as much.
SLACK = (0, 3, 8)


async def one(client: StackClient, rng: random.Random) -> str:
    """One request, cancelled at a random moment in half of the cases; what became of it."""
    message = request(
        rng.choice(TEXT_PROMPTS) * rng.randint(1, 4),
        max_tokens=rng.randint(1, 80),
        temperature=rng.choice([0.0, 1.0]),
        logprobs=rng.choice([None, 0, 5]),
        stop=rng.choice([[], ["the"], [" whale", "\n"]]),
    )
    task = asyncio.create_task(client.generate(message))
    if rng.random() < 0.5:
        await asyncio.wait([task], timeout=rng.random() * 0.6)
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return (await task).finish_reason
    return "cancelled by the client"


async def load(client: StackClient, rng: random.Random, num_requests: int) -> list[str]:
    """Requests at concurrency 32; what became of each."""
    gate = asyncio.Semaphore(32)

    async def gated() -> str:
        async with gate:
            return await one(client, rng)

    return await asyncio.gather(*(gated() for _ in range(num_requests)))


async def resources(stack: Stack) -> dict[str, tuple[int, int, int]]:
    """Tasks, threads and file descriptors by service."""
    counts = {}
    for role in ("routers", "prefill", "decode"):
        for service in stack.services(role):
            seen = await status(service["grpc"])
            counts[service["name"]] = (seen.num_tasks, seen.num_threads, seen.num_fds)
    return counts


async def is_quiet(stack: Stack) -> bool:
    for role in ("prefill", "decode"):
        for service in stack.services(role):
            seen = await status(service["grpc"])
            if seen.num_streams or seen.num_queued or seen.blocks.referenced or seen.blocks.draining:
                return False
            assert seen.blocks.free == seen.blocks.total
    return (await status(stack.router)).num_streams == 0


async def test_nothing_is_left_after_mixed_load_with_cancels(stack: Stack) -> None:
    rng = random.Random(11)
    async with StackClient(stack.router) as client:
        await load(client, rng, 64)  # gRPC opens its pollers at the first load and keeps them
        await until(lambda: is_quiet(stack), 5, "quiet before")
        before = await resources(stack)
        outcomes = await load(client, rng, 200)
    assert {"length", "cancelled by the client"} <= set(outcomes), set(outcomes)
    assert not set(outcomes) & {"error", "deadline"}
    await until(lambda: is_quiet(stack), 5, "no block referenced, no stream, nothing queued")
    await until(lambda: no_request_keys(stack), 5, "no handoff: or stream: key in Redis")

    after: dict[str, tuple[int, int, int]] = {}

    async def as_before() -> bool:
        after.update(await resources(stack))
        return all(
            now <= then + slack
            for name in before
            for now, then, slack in zip(after[name], before[name], SLACK, strict=True)
        )

    await until(as_before, 20, lambda: f"tasks, threads and descriptors as before: {before}, now {after}")


async def no_request_keys(stack: Stack) -> bool:
    async with redis.asyncio.from_url(stack.redis_url) as client:
        keys = [key async for key in client.scan_iter(count=1000)]
    return not [key for key in keys if key.startswith((b"handoff:", b"stream:"))]


async def test_a_dropped_call_frees_its_blocks_at_once(stack: Stack) -> None:
    async with StackClient(stack.router) as client:
        call = client.stub.Generate(request("And", max_tokens=2000, ignore_eos=True), timeout=60)
        async for response in call:
            if response.WhichOneof("event") == "tokens":
                break
        call.cancel()
    await until(lambda: is_quiet(stack), 1.0, "blocks free 1 s after the client left")
