"""Every architecture through a running stack: greedy tokens and logprobs against transformers in fp32."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from isthmus.testing.stack import Result, Stack, StackClient, request, running_stack
from tests.oracle.configs import ARCHITECTURES
from tests.oracle.models import Write, Written, load_oracle
from tests.oracle.runs import prompt, run_oracle

QUICK = ("minicpm3", "mistral4")
SEED = 4
LENGTHS = (1, 17, 40, 64, 65, 100, 130, 203)
NUM_TOKENS = 48
TOP = 20
MARGIN = 1e-3  # a first difference is excused only where the oracle's two best logits are closer than this
ONE_IN = 20  # streams that may need the excuse


@dataclass(frozen=True)
class Served:
    model: Written
    stack: Stack
    eos: int  # among what the last prompt's greedy stream emits


@pytest.fixture(
    scope="module",
    params=[pytest.param(a, marks=() if a in QUICK else pytest.mark.oracle) for a in ARCHITECTURES],
)
def served(request: pytest.FixtureRequest, written: Write) -> Iterator[Served]:
    model = written(request.param, SEED)
    eos = greedy(model, prompts()[-1], 6)[-1]
    generation = {"bos_token_id": 256, "eos_token_id": [257, eos]}
    (model.served / "generation_config.json").write_text(json.dumps(generation))
    with running_stack("--model", str(model.served)) as stack:
        yield Served(model, stack, eos)


@pytest.fixture(scope="module")
def excused() -> Iterator[list[str]]:
    """Streams of the whole run whose first difference was excused."""
    streams: list[str] = []
    yield streams
    excuses = [stream for stream in streams if stream]
    assert len(excuses) <= max(1, len(streams) // ONE_IN), excuses


def prompts() -> list[list[int]]:
    return [prompt(length, seed=length) for length in LENGTHS]


def greedy(model: Written, prompt_ids: list[int], count: int) -> list[int]:
    oracle, tokens = load_oracle(model.oracle), []
    for _ in range(count):
        tokens.append(int(run_oracle(oracle, [*prompt_ids, *tokens]).logits[-1].argmax()))
    return tokens


async def test_greedy_tokens_and_logprobs_equal_transformers(served: Served, excused: list[str]) -> None:
    requests = [
        request(ids, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=TOP) for ids in prompts()
    ]
    async with StackClient(served.stack.router) as client:
        results = await asyncio.gather(*(client.generate(message) for message in requests))
    oracle = load_oracle(served.model.oracle)
    for ids, result in zip(prompts(), results, strict=True):
        assert len(result.token_ids) == NUM_TOKENS
        run = run_oracle(oracle, [*ids, *result.token_ids[:-1]])
        logits, margins = run.logits[len(ids) - 1 :], run.margins[len(ids) - 1 :]
        # One forward over our own tokens: up to the first difference it sees what its own generation would see.
        chosen = logits.argmax(-1).tolist()
        same = next((i for i, (a, b) in enumerate(zip(result.token_ids, chosen, strict=True)) if a != b), NUM_TOKENS)
        excuse = ""
        if same < NUM_TOKENS:
            excuse = f"{served.model.config.name}, prompt of {len(ids)}, token {same}: margin {margins[same]:.1e}"
            print(excuse)
            assert margins[same] < MARGIN, excuse
        excused.append(excuse)
        compare_logprobs(result, logits[:same].log_softmax(-1))


def compare_logprobs(result: Result, expected: torch.Tensor) -> None:
    for (logprob, top), row in zip(result.logprobs, expected, strict=False):
        assert len(top) == TOP
        values = torch.tensor([value for _, value in top])
        torch.testing.assert_close(values, row[[token_id for token_id, _ in top]], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(values, row.topk(TOP).values, atol=1e-4, rtol=1e-5)
        assert logprob == top[0][1], "greedy takes the best"


async def test_k_an_end_token_ends_only_streams_that_heed_it(served: Served) -> None:
    async with StackClient(served.stack.router) as client:
        free, ended = [
            await client.generate(request(prompts()[-1], max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=ignore))
            for ignore in (True, False)
        ]
    assert len(free.token_ids) == NUM_TOKENS
    assert ended.token_ids == free.token_ids[: free.token_ids.index(served.eos) + 1]
    assert ended.finish_reason == "stop"
