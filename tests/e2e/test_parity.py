"""Greedy tokens and logprobs of the running stack against transformers in fp32 on the same checkpoint."""

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from isthmus.testing.stack import StackClient, request
from tests.e2e.prompts import TEXT_PROMPTS

NUM_TOKENS = 64
TOP = 20
BUNDLED = Path(__file__).resolve().parents[2] / "isthmus" / "bundled"
MARGIN = 1e-3  # a first difference is excused only where the oracle's two best logits are closer than this


@pytest.fixture(scope="module")
def oracle():
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(BUNDLED)


def greedy(model, prompt_ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Tokens, and the raw logits [NUM_TOKENS, vocab] they were chosen from."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt_ids]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(prompt_ids) :].tolist(), torch.cat(out.logits).float()


async def test_greedy_tokens_and_logprobs_equal_transformers(client: StackClient, oracle) -> None:
    model, tokenizer = oracle
    requests = [
        request(prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=TOP)
        for prompt in TEXT_PROMPTS
    ]
    results = await asyncio.gather(*(client.generate(message) for message in requests))
    excused = []
    for prompt, result in zip(TEXT_PROMPTS, results, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        assert result.accepted.num_prompt_tokens == len(prompt_ids)
        tokens, logits = greedy(model, prompt_ids)
        same = next((i for i, (a, b) in enumerate(zip(result.token_ids, tokens, strict=True)) if a != b), NUM_TOKENS)
        if same < NUM_TOKENS:
            best = logits[same].topk(2).values
            margin = float(best[0] - best[1])
            print(f"first difference at {same} of {prompt!r}: the oracle's margin is {margin:.2e}")
            assert margin < MARGIN
            excused.append(prompt)
        compare_logprobs(result.logprobs[:same], logits[:same].log_softmax(-1))
    assert len(excused) <= 1, excused


def compare_logprobs(got, oracle_logprobs: torch.Tensor) -> None:
    for (logprob, top), expected in zip(got, oracle_logprobs, strict=True):
        assert len(top) == TOP
        ids = [token_id for token_id, _ in top]
        values = torch.tensor([value for _, value in top])
        torch.testing.assert_close(values, expected[ids], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(values, expected.topk(TOP).values, atol=1e-4, rtol=1e-5)
        assert logprob == top[0][1], "greedy takes the best"
