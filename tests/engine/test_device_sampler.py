"""The device sampler gives the host sampler's tokens and logprobs, row by row."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from isthmus.engine.device_sampler import DeviceSampler
from isthmus.engine.sampler import sample
from isthmus.errors import NonFiniteLogits
from isthmus.steps import SamplingInput
from isthmus.types import Request, SamplingParams, Token
from kernels.table import Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EOS = (3, 11)


def device_sampler(vocab: int, *, chunk: int = 512, num_entries: int = 64) -> DeviceSampler:
    configs = {
        "sampler_stats": Config({"CHUNK": chunk}, 4, 1),
        "sampler_adjust": Config({"BLOCK": 64}, 4, 1),
        "sampler_bins": Config({"CHUNK": chunk, "LANES": chunk}, 4, 1),
        "sampler_plan": Config({}, 4, 1),
        "sampler_gather": Config({"CHUNK": chunk, "BLOCK": chunk}, 4, 1),
        "sampler_finish": Config({"LANES": chunk}, 4, 1),
    }
    return DeviceSampler(vocab, 16, DEVICE, num_entries=num_entries, configs=configs)


def sequence_of(
    sampling: SamplingParams, *, seed: int = 0, ids: tuple[int, ...] = (), name: str = "r"
) -> SamplingInput:
    return SamplingInput(Request(name, seed, (1, 2, 2, 7), sampling, eos_token_ids=EOS), ids)


def random_sequence(number: int, vocab: int) -> SamplingInput:
    choose = random.Random(number)
    sampling = SamplingParams(
        max_tokens=100,
        min_tokens=choose.choice([0, 0, 9]),
        temperature=choose.choice([0.0, 0.5, 0.7, 1.0, 1.3, 20.0]),
        top_p=choose.choice([1.0, 0.95, 0.6, 0.1]),
        top_k=choose.choice([0, -1, 1, 3, 40, vocab - 1, vocab, vocab + 1]),
        min_p=choose.choice([0.0, 0.0, 0.02, 0.5]),
        stop_token_ids=choose.choice([(), (5, 11)]),
        ignore_eos=choose.random() < 0.3,
        logprobs=choose.choice([None, 0, 3]),
        presence_penalty=choose.choice([0.0, 0.0, 0.5]),
        frequency_penalty=choose.choice([0.0, 0.0, 0.1, -0.7]),
        repetition_penalty=choose.choice([1.0, 1.0, 1.2, 0.8]),
        logit_bias=choose.choice([(), (), ((5, 3.0), (6, -3.25), (vocab - 1, 40.0))]),
    )
    ids = tuple(choose.randrange(vocab) for _ in range(choose.randrange(12)))
    return sequence_of(sampling, seed=choose.getrandbits(64), ids=ids + ids[:3], name=str(number))


def assert_same(logits: Tensor, sequences: list[SamplingInput], sampler: DeviceSampler | None = None) -> None:
    before = logits.clone()
    sampler = sampler or device_sampler(logits.shape[1])
    results = sampler.sample(logits, sequences)
    assert torch.equal(logits, before)
    for result, expected in zip(results, sample(logits, sequences), strict=True):
        assert isinstance(result, Token)
        assert isinstance(expected, Token)
        assert replace(result, logprob=None) == replace(expected, logprob=None)
        assert (result.logprob is None) == (expected.logprob is None)
        # The fp64 sum behind a logprob is folded in another order.
        assert result.logprob is None or result.logprob == pytest.approx(expected.logprob, rel=2e-7)


@pytest.mark.parametrize(("vocab", "scale", "step"), [(300, 1.0, 0), (700, 4.0, 0.5), (1300, 3.0, 0), (513, 0.1, 0)])
def test_tokens_are_the_hosts(vocab: int, scale: float, step: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(6, vocab, generator=generator) * scale).to(DEVICE)
    if step:
        logits = (logits / step).round() * step  # many ties
    assert_same(logits, [random_sequence(vocab + number, vocab) for number in range(6)])


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 1e-9},
        {"top_p": 1e-300},
        {"top_p": math.nextafter(1, 0), "temperature": 2.0},
        {"top_k": 2, "top_p": 0.5},
        {"min_p": 0.999},
        {"temperature": 1e-30},
        {"temperature": 1e-40},
        {"temperature": 1e6},
        {"top_k": 30, "min_p": 0.2, "top_p": 0.8},
    ],
)
def test_at_the_borders_of_parameters(fields: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = ((torch.randn(3, 260, generator=generator) * 4).round() / 2).to(DEVICE)
    logits[2] = 1.25  # all tie
    sampling = replace(SamplingParams(100), **fields)
    assert_same(logits, [sequence_of(sampling, seed=2**64 - seed - 1, name=str(seed)) for seed in range(3)])


@pytest.mark.filterwarnings("ignore:overflow")
def test_extreme_penalties_stay_finite() -> None:
    sampling = SamplingParams(100, repetition_penalty=1e-38, frequency_penalty=3e38, temperature=1e-40)
    logits = (torch.tensor([[5.0, -5.0, 4.0, 0.0] * 20] * 2)).to(DEVICE)
    greedy = replace(sampling, temperature=0.0, presence_penalty=0.1)
    assert_same(logits, [sequence_of(sampling, ids=(0, 0, 4), name="a"), sequence_of(greedy, ids=(0, 0, 4), name="b")])


def test_a_minimum_that_cannot_be_kept_is_not() -> None:
    sampling = SamplingParams(100, min_tokens=2, stop_token_ids=tuple(range(40)), temperature=0.0)
    assert_same(torch.arange(40.0, device=DEVICE)[None].contiguous(), [sequence_of(sampling)])


def test_a_row_that_is_not_finite_harms_no_other() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 257, generator=generator)).to(DEVICE)
    sequences = [sequence_of(SamplingParams(100, top_p=0.9, logprobs=0), seed=i, name=str(i)) for i in range(3)]
    sampler = device_sampler(257)
    healthy = sampler.sample(logits, sequences)
    logits[1, 256] = torch.nan
    results = sampler.sample(logits, sequences)
    assert isinstance(results[1], NonFiniteLogits)
    assert [results[0], results[2]] == [healthy[0], healthy[2]]


def test_a_row_is_bit_equal_in_every_batch() -> None:
    vocab = 600
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(8, vocab, generator=generator) * 3).to(DEVICE)
    sequences = [random_sequence(1000 + number, vocab) for number in range(8)]
    together = device_sampler(vocab).sample(logits, sequences)
    others = device_sampler(vocab)  # has seen other requests before, rows stand elsewhere
    for rows in ([5], [7, 2, 0], [1, 6]):
        assert others.sample(logits[rows], [sequences[row] for row in rows]) == [together[row] for row in rows]


def test_how_the_vocabulary_is_cut_changes_no_token() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = (torch.randn(3, 600, generator=generator)).to(DEVICE)
    sequences = [random_sequence(2000 + number, 600) for number in range(3)]
    results = [device_sampler(600, chunk=chunk).sample(logits, sequences) for chunk in (128, 1024)]
    assert [token.id for token in results[0]] == [token.id for token in results[1]]  # type: ignore[union-attr]


def test_penalties_go_on_from_step_to_step() -> None:
    sampling = SamplingParams(
        100, min_tokens=4, temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.5, logprobs=2
    )
    generator, sampler = torch.Generator().manual_seed(4), device_sampler(64)
    request = sequence_of(sampling).request
    ids: list[int] = []
    for _ in range(8):
        logits = (torch.randn(1, 64, generator=generator) + torch.linspace(0, 3, 64)).to(DEVICE)
        sequence = SamplingInput(request, tuple(ids))
        assert_same(logits, [sequence], sampler)
        ids.append(sample(logits, [sequence])[0].id)  # type: ignore[union-attr]
    shorter = SamplingInput(request, tuple(ids[:2]))  # the request again, as a replay has it
    assert_same(logits.repeat(2, 1), [shorter, replace(shorter, token_ids=tuple(ids))], sampler)


def test_a_long_prompt_is_penalised_as_a_whole() -> None:
    prompt = tuple(range(0, 600, 2))
    logits = (torch.randn(1, 600, generator=torch.Generator().manual_seed(3)) + 2).to(DEVICE)
    sampling = SamplingParams(100, temperature=0.0, repetition_penalty=3.0, logit_bias=((1, -9.0),), logprobs=0)
    request = Request("r", 0, prompt, sampling)
    sampler = device_sampler(600, num_entries=2)  # which is too few
    assert_same(logits, [SamplingInput(request, tuple(range(1, 500, 7)))], sampler)
    assert len(sampler.inputs.entries) >= 300


def test_indices_may_run_ahead_of_the_tokens() -> None:
    generator, sampler = torch.Generator().manual_seed(6), device_sampler(300)
    logits = (torch.randn(1, 300, generator=generator)).to(DEVICE)
    sampling = SamplingParams(100, min_tokens=3, logit_bias=((3, 50.0),))
    sampler.stage([sequence_of(sampling, seed=8, ids=(1,))], [3])
    (token,) = sampler.collect(sampler.launch(logits), logits).results()
    assert [token] == sample(logits, [sequence_of(sampling, seed=8, ids=(1, 1, 1))])
    assert token == Token(3)


def test_rows_past_the_staged_ones_are_plain() -> None:
    logits, sampler = torch.randn(4, 100, device=DEVICE), device_sampler(100)
    sampler.sample(logits, [sequence_of(SamplingParams(100, logprobs=0), name=str(i)) for i in range(4)])
    sampler.stage([sequence_of(SamplingParams(100, temperature=0.0))])
    sampled = sampler.launch(logits)
    assert sampled.tokens.tolist() == logits.argmax(1).tolist()
    assert sampler.collect(sampled, logits).results() == [Token(int(logits[0].argmax()))]


def test_limits_are_refused_by_name() -> None:
    sampler = device_sampler(100)
    with pytest.raises(ValueError, match="16 rows at most, not 17"):
        sampler.stage([sequence_of(SamplingParams(100))] * 17)
    with pytest.raises(ValueError, match="the vocabulary is 300000"):
        DeviceSampler(300_000, 1, DEVICE)
    assert sampler.sample(torch.empty(0, 100, device=DEVICE), []) == []
