"""Clients that leave: long prefills nobody waits for any more, and a storm of cancels at random phases."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Sequence

import grpc.aio
import pytest

from isthmus.testing.stack import Stack, StackClient, request, running_stack, status, until
from isthmus.v1 import inference_pb2
from tests.chaos.evidence import SEED
from tests.chaos.quiet import num_tasks, until_quiet
from tests.e2e.prompts import TEXT_PROMPTS

NUM_LONG, LONG_TOKENS = 10, 2000  # of the bundled model's 2,048; computing one takes it half a second and more
SHORT_DELAY_S = 0.5
NUM_CANCELS = int(os.environ.get("CHAOS_CANCELS", "2000"))
NUM_AT_ONCE = 64
MAX_WAIT_S = 0.6
MAX_EVENTS = 1000
FREE_WITHIN_S = 2.0
TASK_SLACK = 2  # a lease or a probe may be under way at either count

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]


def long_prefill(number: int) -> inference_pb2.GenerateRequest:
    """Prompts that share no block."""
    return request([10 + number + (7 * k) % 1000 for k in range(LONG_TOKENS)], max_tokens=20, ignore_eos=True)


async def ttft_s(client: StackClient, prompt: str) -> float:
    began = time.monotonic()
    result = await client.generate(request(prompt, max_tokens=2, ignore_eos=True))
    return result.arrival_s[0] - began


async def accepted(client: StackClient, message: inference_pb2.GenerateRequest) -> "grpc.aio.UnaryStreamCall":
    call = client.stub.Generate(message, timeout=60)
    first = await call.read()
    assert first.WhichOneof("event") == "accepted"
    return call


async def a_prefill_runs(stack: Stack, num_begun: int) -> None:
    """Some of the long prompts have been begun, others wait."""

    async def begun() -> bool:
        return any(seen > num_begun for seen in await _steps(stack))

    await until(begun, 5, "a prefill step")


async def _steps(stack: Stack) -> Sequence[int]:
    return [(await status(entry["grpc"])).num_steps for entry in stack.services("prefill")]


async def test_ten_cancelled_long_prefills_hardly_delay_a_short_request() -> None:
    with running_stack() as stack:
        async with StackClient(stack.router) as client:
            quiet_s = sorted([await ttft_s(client, prompt) for prompt in TEXT_PROMPTS[:5]])[2]
            steps = max(await _steps(stack))
            calls = await asyncio.gather(*(accepted(client, long_prefill(number)) for number in range(NUM_LONG)))
            await a_prefill_runs(stack, steps)
            for call in calls:
                call.cancel()
            delayed_s = await ttft_s(client, TEXT_PROMPTS[6])
            print(
                f"\nfirst token {1000 * quiet_s:.0f} ms on a quiet stack, {1000 * delayed_s:.0f} ms after ten cancels"
            )
            assert delayed_s - quiet_s < SHORT_DELAY_S
            await until_quiet(stack, FREE_WITHIN_S)


async def cancelled_at_random(client: StackClient, rng: random.Random) -> str:
    """One request of any kind, dropped after a random time or a random number of tokens; how far it was."""
    long = rng.random() < 0.1
    prompt = [rng.randrange(10, 2000) for _ in range(rng.randrange(500, 1500))] if long else rng.choice(TEXT_PROMPTS)
    message = request(prompt, max_tokens=rng.randrange(1, 30), ignore_eos=True, temperature=rng.choice([0.0, 1.0]))
    wait_s = rng.random() ** 2 * MAX_WAIT_S if rng.random() < 0.7 else None
    call, heard = client.stub.Generate(message, timeout=60), ["sent"]
    reading = asyncio.ensure_future(_read(call, heard, MAX_EVENTS if wait_s else rng.randrange(1, 12)))
    await asyncio.wait([reading], timeout=wait_s)
    call.cancel()
    await reading
    return heard[-1]


async def _read(call: "grpc.aio.UnaryStreamCall", heard: list[str], num_events: int) -> None:
    try:
        async for response in call:
            heard.append(response.WhichOneof("event"))
            if len(heard) > num_events:
                return
    except asyncio.CancelledError:
        return
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:  # more than two workers take in the queue's time
            raise
        heard.append("refused")


async def storm(client: StackClient, rng: random.Random, num_requests: int) -> Counter[str]:
    """How far the requests were when they were cancelled."""
    gate = asyncio.Semaphore(NUM_AT_ONCE)

    async def gated() -> str:
        async with gate:
            return await cancelled_at_random(client, rng)

    return Counter(await asyncio.gather(*(gated() for _ in range(num_requests))))


async def test_a_storm_of_cancels_leaves_nothing() -> None:
    rng = random.Random(SEED)
    with running_stack("--prefill", "2", "--decode", "2") as stack:
        async with StackClient(stack.router) as client:
            await storm(client, rng, NUM_AT_ONCE)
            await until_quiet(stack, 5.0)
            before = await num_tasks(stack)
            phases = await storm(client, rng, NUM_CANCELS)
            await until_quiet(stack, FREE_WITHIN_S)
            print(f"\ncancelled when last heard of: {dict(phases)}, CHAOS_SEED={SEED}")
            assert phases.keys() >= {"sent", "accepted", "tokens", "finished"}

            async def as_before() -> bool:
                return all(now <= before[name] + TASK_SLACK for name, now in (await num_tasks(stack)).items())

            await until(as_before, 10, f"tasks as before: {before}, now {await num_tasks(stack)}")
            assert await ttft_s(client, TEXT_PROMPTS[2]) < 5.0
