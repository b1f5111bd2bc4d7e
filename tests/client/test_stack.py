"""The library and a real stack whose routers and workers are lost under its streams."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from isthmus.client import AsyncClient, Client, Generation
from isthmus.testing.processes import SERVES_AGAIN_S, left_over, serves, statuses
from isthmus.testing.stack import Stack, until
from isthmus.types import FinishReason

pytestmark = pytest.mark.e2e
ASKED: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "logprobs": 2}
KINDS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "seeded": {"temperature": 0.9, "seed": 11}}
NUM_STREAMS = 4
STRUCK_AT = 40  # tokens of the first stream


@pytest.fixture(scope="module")
def whole(stack: Stack) -> dict[str, Generation]:
    """What nobody disturbs."""
    with Client(stack.router) as client:
        return {kind: client.complete(**ASKED, **options) for kind, options in KINDS.items()}


@pytest.fixture(autouse=True)
async def quiet(stack: Stack) -> AsyncIterator[None]:
    """Every process serves before the next test."""

    async def all_serve() -> bool:
        services = [entry for entry in stack.current() if entry["pool"] != "redis"]
        roles = {"routers": "router"}
        asked = (serves(stack, one["name"], one["grpc"], roles.get(one["pool"], one["pool"])) for one in services)
        return all(await asyncio.gather(*asked))

    yield
    await until(all_serve, SERVES_AGAIN_S, "every process serves again")


def assert_same(generation: Generation, whole: Generation) -> None:
    assert generation.tokens == whole.tokens
    assert generation.text == whole.text
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.usage.num_generated_tokens == len(whole.tokens)


async def struck(stack: Stack, name: str, number: signal.Signals, kind: str) -> list[Generation]:
    """Several streams; the process is struck when the first has so many tokens."""

    async def first(client: AsyncClient) -> Generation:
        stream = client.generate(**ASKED, **KINDS[kind])
        async for chunk in stream.chunks():
            if chunk.index <= STRUCK_AT < chunk.index + len(chunk.tokens):
                stack.send(name, number)
        return stream.result

    async with AsyncClient(stack.routers) as client:
        others = (client.complete(**ASKED, **KINDS[kind]) for _ in range(NUM_STREAMS - 1))
        return await asyncio.gather(first(client), *others)


@pytest.mark.parametrize(("name", "kind"), [("router-0", "seeded"), ("prefill-0", "greedy"), ("decode-0", "seeded")])
async def test_a_killed_process_is_not_seen(stack: Stack, whole: dict[str, Generation], name: str, kind: str) -> None:
    generations = await struck(stack, name, signal.SIGKILL, kind)
    for generation in generations:
        assert_same(generation, whole[kind])
    assert name != "router-0" or sum(generation.num_resumes for generation in generations) >= 1


async def test_a_frozen_router_is_not_seen(stack: Stack, whole: dict[str, Generation]) -> None:
    began = time.monotonic()
    try:
        generations = await struck(stack, "router-0", signal.SIGSTOP, "seeded")
    finally:
        stack.send("router-0", signal.SIGCONT)
    for generation in generations:
        assert_same(generation, whole["seeded"])
    assert sum(generation.num_resumes for generation in generations) >= 1
    assert time.monotonic() - began < 45


async def test_both_routers_killed_at_once_are_not_seen(stack: Stack, whole: dict[str, Generation]) -> None:
    stream_text = []
    with Client(stack.routers) as client:
        stream = client.generate(**ASKED, **KINDS["seeded"])

        def read() -> None:
            for number, piece in enumerate(stream):
                stream_text.append(piece)
                if number == STRUCK_AT // 4:
                    stack.send("router-0", signal.SIGKILL)
                    stack.send("router-1", signal.SIGKILL)

        await asyncio.to_thread(read)
    assert_same(stream.result, whole["seeded"])
    assert "".join(stream_text) == stream.result.text


async def test_streams_that_are_left_hold_nothing(stack: Stack) -> None:
    async with AsyncClient(stack.routers) as client:

        async def leave(number: int) -> None:
            stream = client.generate(f"Chapter {number}", max_tokens=1500, ignore_eos=True)
            async for _ in stream:
                if len(stream.result.tokens) > number:
                    break

        await asyncio.gather(*(leave(number) for number in range(12)))

        async def nothing_held() -> bool:
            return left_over(await statuses(stack)) == []

        await until(nothing_held, 2.0, "no stream and no block is held")


async def test_calls_around_generation(stack: Stack) -> None:
    async with AsyncClient(stack.routers) as client:
        (model,) = await client.list_models()
        ids = await client.tokenize("Once upon a time")
        assert await client.detokenize(ids) == "Once upon a time"
        assert max(ids) < model.vocab_size
        assert (await client.complete(token_ids=ids, max_tokens=3)).usage.num_prompt_tokens == len(ids)
