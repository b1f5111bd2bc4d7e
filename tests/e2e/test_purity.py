"""Generation is a pure function of the request: company, order, pools and block size change no bit of it."""

import asyncio
import random

import pytest

from isthmus.testing.stack import Result, StackClient, request, running_stack
from tests.e2e.prompts import TEXT_PROMPTS

CHAT = [("user", "My name is Anna."), ("assistant", "Hello, Anna!"), ("user", "What is my name?")]


def requests():
    """Each prompt greedy and seeded; seeds and penalties differ so that no stream repeats another."""
    for number, prompt in enumerate(TEXT_PROMPTS):
        yield request(prompt, max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=5)
        yield request(
            prompt,
            max_tokens=24,
            temperature=0.9,
            top_p=0.95,
            top_k=50,
            min_p=0.01,
            seed=1000 + number,
            presence_penalty=0.3,
            frequency_penalty=0.2,
            repetition_penalty=1.1,
            ignore_eos=True,
            logprobs=5,
        )


def bits(result: Result) -> tuple[object, ...]:
    return (tuple(result.token_ids), tuple(result.logprobs), result.text, result.finish_reason)


async def one_by_one(client: StackClient) -> list[tuple[object, ...]]:
    return [bits(await client.generate(message)) for message in requests()]


async def all_at_once(client: StackClient) -> list[tuple[object, ...]]:
    return [bits(result) for result in await asyncio.gather(*(client.generate(message) for message in requests()))]


async def shuffled_among_others(client: StackClient) -> list[tuple[object, ...]]:
    """In random order, staggered, with chats of random length beside them."""
    order = list(enumerate(requests()))
    rng = random.Random(7)
    rng.shuffle(order)
    results: dict[int, tuple[object, ...]] = {}

    async def measured(number, message) -> None:
        await asyncio.sleep(rng.random())
        results[number] = bits(await client.generate(message))

    async def other() -> None:
        await asyncio.sleep(rng.random())
        await client.generate(request(CHAT, max_tokens=rng.randint(1, 60), temperature=1.0, ignore_eos=True))

    await asyncio.gather(*(measured(*item) for item in order), *(other() for _ in range(20)))
    return [results[number] for number in range(len(order))]


async def test_alone_together_and_shuffled_give_the_same_bits(client: StackClient) -> None:
    alone = await one_by_one(client)
    assert await all_at_once(client) == alone
    assert await shuffled_among_others(client) == alone


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
async def test_pools_and_block_sizes_give_the_same_bits(dtype: str) -> None:
    answers = []
    for flags in (["--block-size", "16"], ["--block-size", "64", "--prefill", "2", "--decode", "2"]):
        with running_stack("--dtype", dtype, *flags) as stack:
            async with StackClient(stack.router) as client:
                answers.append(await all_at_once(client))
    assert answers[0] == answers[1]
