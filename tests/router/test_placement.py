"""Waiting for a place: who waits for one role's room never holds up what would free the other's."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from isthmus.errors import IsthmusError, NoFreeBlocks
from isthmus.v1 import decode_pb2
from router.policy import MAX_TOKENS_AHEAD
from tests.router.fakes import Cluster, RunningRouter, ask, running_router, until


@pytest.fixture
async def router() -> AsyncIterator[RunningRouter]:
    cluster = Cluster()
    await cluster.add_decode()
    await cluster.add_prefill()
    async with running_router(cluster, queue_timeout_s=3.0) as running:
        yield running
        await running.is_quiet()
    await cluster.close()


async def test_requests_short_of_both_kinds_of_room_pass_one_by_one(router: RunningRouter) -> None:
    """The one that waits for blocks holds the whole prefill queue, which the one behind it waits for."""
    decode = router.cluster.decode[0]
    decode.refuse = lambda reserve: NoFreeBlocks("full") if decode.streams else None
    decode.token_interval_s = 0.005

    prompts = [str(i) * MAX_TOKENS_AHEAD for i in range(6)]
    results = await asyncio.gather(*(router.generate(ask(prompt, max_tokens=20)) for prompt in prompts))

    assert {len(result.token_ids) for result in results} == {20}


async def test_small_requests_do_not_starve_a_large_one(router: RunningRouter) -> None:
    """Blocks for a small one are free all the time; for the large one only once the small ones let it pass."""
    decode = router.cluster.decode[0]
    decode.token_interval_s = 0.005
    order: list[str] = []

    def refuse(reserve: decode_pb2.Reserve) -> IsthmusError | None:
        is_large = len(reserve.request.prompt_token_ids) > 100
        return NoFreeBlocks("full") if len(decode.streams) >= (1 if is_large else 3) else None

    async def generate(name: str, prompt: str) -> None:
        await router.generate(ask(prompt, max_tokens=20))
        order.append(name)

    decode.refuse = refuse
    async with asyncio.TaskGroup() as group:
        for i in range(2):
            group.create_task(generate(f"before {i}", f"small {i}"))
        await until(lambda: len(decode.streams) == 2, "the first small ones run")
        group.create_task(generate("large", "L" * 200))
        await until(lambda: len(decode.reserves) >= 3, "the large one asks")
        for i in range(12):
            group.create_task(generate(f"behind {i}", f"small, later {i}"))

    assert set(order[:2]) == {"before 0", "before 1"}
    assert order[2] == "large"
