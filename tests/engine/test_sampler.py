"""The sampler against a slow definition of its semantics, and the promise that a row depends on itself alone."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from isthmus.engine.philox import UNIFORM_BITS, uniform_bits
from isthmus.engine.sampler import _adjusted, _argmax, _argmax_on_device, _draw, sample
from isthmus.errors import NonFiniteLogits
from isthmus.steps import SamplingInput
from isthmus.types import Request, SamplingParams, Token

VOCAB = 12
EOS = (3, 11)


def request_of(sampling: SamplingParams, *, seed: int = 0, prompt: Sequence[int] = (1, 2, 2)) -> Request:
    return Request("r", seed, tuple(prompt), sampling, eos_token_ids=EOS)


def greedy(**fields: object) -> SamplingParams:
    return replace(SamplingParams(max_tokens=100, temperature=0.0), **fields)


def one(logits: Sequence[float], request: Request, token_ids: Sequence[int] = ()) -> Token:
    (result,) = sample(torch.tensor([logits], dtype=torch.float32), [SamplingInput(request, token_ids)])
    assert isinstance(result, Token)
    return result


# ---- the definition, slowly


@dataclass(frozen=True)
class Reference:
    token_id: int
    margin: float  # how far every comparison was from going the other way, unless it was an exact tie


def reference_adjusted(logits: Sequence[float], request: Request, token_ids: Sequence[int]) -> list[float]:
    sampling, f32 = request.sampling, np.float32
    values = [f32(value) for value in logits]
    for token_id, bias in sampling.logit_bias:
        values[token_id] += f32(bias)
    for token_id in {*request.prompt_token_ids, *token_ids}:
        penalty = f32(sampling.repetition_penalty)
        values[token_id] = values[token_id] / penalty if values[token_id] > 0 else values[token_id] * penalty
    for token_id, count in Counter(token_ids).items():
        values[token_id] -= f32(count) * f32(sampling.frequency_penalty) + f32(sampling.presence_penalty)
    if len(token_ids) < sampling.min_tokens:
        for token_id in (*sampling.stop_token_ids, *(() if sampling.ignore_eos else request.eos_token_ids)):
            values[token_id] = f32(-math.inf)
    return [float(value) for value in values]


class Comparisons:
    """Exact, and keeps in mind how close a rounded one might have been to going the other way."""

    def __init__(self) -> None:
        self.margin = math.inf

    def at_least(self, left: Fraction, right: Fraction) -> bool:
        if left != right:
            self.margin = min(self.margin, abs(float(left - right)))
        return left >= right


def reference(logits: Sequence[float], request: Request, token_ids: Sequence[int]) -> Reference:
    sampling = request.sampling
    values = reference_adjusted(logits, request, token_ids)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if sampling.temperature == 0:
        return Reference(order[0], math.inf)
    if 0 < sampling.top_k < len(order):
        order = [i for i in order if values[i] >= values[order[sampling.top_k - 1]]]
    p = {i: Fraction(math.exp((values[i] - values[order[0]]) / sampling.temperature)) for i in order}
    compare = Comparisons()
    needed, mass = Fraction(sampling.top_p) * sum(p.values()), list(accumulate(p[i] for i in order))
    if sampling.top_p < 1:
        order = order[: 1 + next(n for n, reached in enumerate(mass) if compare.at_least(reached, needed))]
    order = [i for i in order if compare.at_least(p[i], Fraction(sampling.min_p))]
    uniform = Fraction(uniform_bits(request.seed, len(token_ids)), 1 << UNIFORM_BITS)
    target = uniform * sum(p[i] for i in order)
    passed = accumulate(p[i] for i in order)
    token_id = next(i for i, reached in zip(order, passed, strict=True) if not compare.at_least(target, reached))
    return Reference(token_id, compare.margin)


LOGITS = st.lists(
    st.one_of(st.integers(-8, 8).map(lambda n: n / 4), st.floats(-20, 20, width=32)), min_size=VOCAB, max_size=VOCAB
)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=6)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.just(100),
    min_tokens=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.5, 1e-30]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.25, 1e-6]),
    top_k=st.sampled_from([0, -1, 1, 2, 5, VOCAB, 100]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.25]),
    repetition_penalty=st.sampled_from([1.0, 1.1, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-10, 10, width=32), max_size=3).map(
        lambda bias: tuple(bias.items())
    ),
)


@given(LOGITS, SAMPLING, IDS, IDS, st.integers(0, 2**64 - 1))
@settings(max_examples=300, deadline=None)
def test_tokens_are_those_of_the_definition(
    logits: list[float], sampling: SamplingParams, prompt: list[int], token_ids: list[int], seed: int
) -> None:
    request = request_of(sampling, seed=seed, prompt=prompt)
    expected = reference(logits, request, token_ids)
    assume(expected.margin > 1e-9)
    assert one(logits, request, token_ids).id == expected.token_id


@given(LOGITS, SAMPLING, IDS, IDS)
@settings(deadline=None)
def test_bias_penalties_and_mask_are_those_of_the_definition(
    logits: list[float], sampling: SamplingParams, prompt: list[int], token_ids: list[int]
) -> None:
    sequence = SamplingInput(request_of(sampling, prompt=prompt), token_ids)
    adjusted = _adjusted(np.array(logits, dtype=np.float32), sequence).tolist()
    assert adjusted == reference_adjusted(logits, sequence.request, token_ids)


@pytest.mark.parametrize(
    ("fields", "bits", "index"),
    [
        ({}, 0, 0),
        ({}, 2**22 - 1, 0),
        ({}, 2**22, 1),  # u equals the cumulated probability exactly
        ({}, 2**24 - 1, 3),
        ({"top_p": 0.5}, 2**24 - 1, 1),
        ({"top_p": math.nextafter(0.5, 1)}, 2**24 - 1, 2),
        ({"top_p": 1e-30}, 2**24 - 1, 0),
        ({"min_p": 1.0}, 2**24 - 1, 3),
    ],
)
def test_draws_at_the_borders(fields: dict[str, float], bits: int, index: int) -> None:
    weights = np.full(4, 1 << 40)
    assert _draw(weights, SamplingParams(1, **fields), bits) == index


@given(LOGITS, st.integers(0, VOCAB + 3))
@settings(deadline=None)
def test_logprobs_are_of_the_raw_logits(logits: list[float], top: int) -> None:
    sampling = greedy(logprobs=top, logit_bias=((7, 100.0),), frequency_penalty=1.0)
    token = one(logits, request_of(sampling), (1, 1))
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).tolist()
    order = sorted(range(VOCAB), key=lambda i: (-np.float32(logits[i]), i))[:top]
    assert token.id == 7
    assert token.logprob == pytest.approx(expected[7], rel=1e-6, abs=1e-6)
    assert [i for i, _ in token.top_logprobs] == order
    assert [value for _, value in token.top_logprobs] == pytest.approx([expected[i] for i in order], rel=1e-6, abs=1e-6)
    assert all(np.float32(value) == value for _, value in token.top_logprobs)


def test_no_logprobs_unless_asked_for() -> None:
    assert one([0.0] * VOCAB, request_of(greedy())) == Token(0)


# ---- ties, masks, bad rows


@pytest.mark.parametrize("argmax", [_argmax, _argmax_on_device])
@pytest.mark.parametrize("vocab", [1, 7, 2048, 2049])
def test_argmax_gives_the_lowest_of_equals(argmax: object, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(0, 3, (33, vocab), generator=generator).float()
    logits[logits == 0] = -0.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert argmax(logits) == expected  # type: ignore[operator]


def test_minus_zero_ties_with_zero() -> None:
    logits = [-0.0, 0.0, -0.0, *[-9.0] * (VOCAB - 3)]
    token = one(logits, request_of(SamplingParams(100, top_k=1, logprobs=3), seed=1))
    assert [i for i, _ in token.top_logprobs] == [0, 1, 2]
    drawn = {one(logits, request_of(SamplingParams(100, top_k=1), seed=seed)).id for seed in range(50)}
    assert drawn == {0, 1, 2}


def test_min_tokens_masks_eos_and_stop_ids() -> None:
    logits = [float(i) for i in range(VOCAB)]
    sampling = greedy(min_tokens=2, stop_token_ids=(10,))
    assert one(logits, request_of(sampling), (5,)).id == 9
    assert one(logits, request_of(sampling), (5, 5)).id == 11
    assert one(logits, request_of(replace(sampling, ignore_eos=True)), (5,)).id == 11


def test_a_minimum_that_cannot_be_kept_is_not() -> None:
    sampling = SamplingParams(100, min_tokens=2, stop_token_ids=tuple(range(VOCAB)))
    assert one([1.0] * VOCAB, request_of(sampling)).id in range(VOCAB)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_harms_no_other(bad: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 257, generator=generator)
    sequences = [SamplingInput(request_of(SamplingParams(100, temperature=temperature), seed=i), ()) for i in range(5)]
    healthy = sample(logits, sequences)
    for column in (0, 100, 255, 256):
        poisoned = logits.clone()
        poisoned[2, column] = bad
        results = sample(poisoned, sequences)
        assert isinstance(results[2], NonFiniteLogits)
        assert [*results[:2], *results[3:]] == [*healthy[:2], *healthy[3:]]


def test_extreme_penalties_stay_finite() -> None:
    sampling = SamplingParams(100, repetition_penalty=1e-38, frequency_penalty=3e38, temperature=1e-40)
    assert one([5.0, -5.0] * 6, request_of(sampling), (0, 0, 4)).id in range(VOCAB)


def test_no_rows_no_tokens() -> None:
    assert sample(torch.empty(0, 8), []) == []


# ---- purity


def random_input(number: int, vocab: int) -> SamplingInput:
    choose = random.Random(number)
    sampling = SamplingParams(
        max_tokens=100,
        min_tokens=choose.choice([0, 0, 9]),
        temperature=choose.choice([0.0, 0.5, 1.0, 1.3]),
        top_p=choose.choice([1.0, 0.95, 0.6]),
        top_k=choose.choice([0, 1, 40]),
        min_p=choose.choice([0.0, 0.02]),
        logprobs=choose.choice([None, 0, 5, 20]),
        presence_penalty=choose.choice([0.0, 0.5]),
        frequency_penalty=choose.choice([0.0, 0.1]),
        repetition_penalty=choose.choice([1.0, 1.2]),
        logit_bias=choose.choice([(), ((5, 3.0), (6, -3.0))]),
    )
    ids = [choose.randrange(vocab) for _ in range(60)]
    return SamplingInput(request_of(sampling, seed=choose.getrandbits(64), prompt=ids[:50]), ids[50:])


@pytest.mark.parametrize("vocab", [1009, 2048])
def test_a_row_is_bit_equal_in_every_batch(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(64, vocab, generator=generator) * 4
    inputs = [random_input(number, vocab) for number in range(64)]
    alone = [sample(logits[i : i + 1], [inputs[i]])[0] for i in range(64)]
    shuffle = random.Random(vocab)
    for size in range(1, 65, 3):
        rows = shuffle.sample(range(64), size)
        assert sample(logits[rows], [inputs[i] for i in rows]) == [alone[i] for i in rows]
    strided = torch.stack([logits, logits], dim=1)[:, 0]  # rows that do not follow one another in memory
    assert sample(strided, inputs) == alone


def fake_logits(history: Sequence[int]) -> list[float]:
    choose = random.Random(str(list(history)))
    return [choose.gauss(0, 2) for _ in range(VOCAB)]


def test_a_resumed_sequence_goes_on_as_it_would_have() -> None:
    sampling = SamplingParams(100, min_tokens=3, frequency_penalty=0.2, repetition_penalty=1.1, top_p=0.9, logprobs=3)
    request = request_of(sampling, seed=77)

    def run(emitted: list[int]) -> list[Token]:
        tokens, ids = [], list(emitted)
        while len(ids) < 20:
            tokens.append(one(fake_logits(ids), request, ids))
            ids.append(tokens[-1].id)
        return tokens

    whole = run([])
    assert len({token.id for token in whole}) > 4
    for cut in range(20):
        assert run([token.id for token in whole[:cut]]) == whole[cut:]


@pytest.mark.parametrize("by", ["seed", "index"])
def test_frequencies_are_the_probabilities(by: str) -> None:
    logits, num = [2.0, 1.0, 1.0, 0.0, -1.0, 0.5, 1.5, -0.5], 3000
    sampling = SamplingParams(10_000, temperature=0.8)
    rows = [(i, ()) if by == "seed" else (9, (0,) * i) for i in range(num)]
    inputs = [SamplingInput(request_of(sampling, seed=seed), token_ids) for seed, token_ids in rows]
    results = sample(torch.tensor([logits]).expand(num, -1), inputs)
    counts = Counter(token.id for token in results if isinstance(token, Token))
    expected = (torch.softmax(torch.tensor(logits) / 0.8, 0) * num).tolist()
    assert sum((counts[i] - e) ** 2 / e for i, e in enumerate(expected)) < 35  # chi-square, 7 degrees: p > 1e-5
