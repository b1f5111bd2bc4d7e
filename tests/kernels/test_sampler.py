"""The device sampler's arithmetic against Python's integers, and its rows against the host's definition."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from isthmus.engine.philox import uniform_bits as host_uniform_bits
from isthmus.engine.sampler import _share
from kernels.sampler.parameters import ENTRY_FIELDS, ROW_FIELDS
from kernels.sampler.sample import SamplerInputs, sample_logits, uniform_bits
from kernels.sampler.select import drawn, key, share, value
from kernels.table import Config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROW = np.dtype(list(ROW_FIELDS.items()))
ENTRY = np.dtype(list(ENTRY_FIELDS.items()))
CONFIGS = {
    "sampler_stats": Config({"CHUNK": 128}, 4, 1),
    "sampler_adjust": Config({"BLOCK": 16}, 4, 1),
    "sampler_bins": Config({"CHUNK": 128, "LANES": 128}, 4, 1),
    "sampler_plan": Config({}, 4, 1),
    "sampler_gather": Config({"CHUNK": 128, "BLOCK": 64}, 2, 1),
    "sampler_finish": Config({"LANES": 64}, 2, 1),
}


@triton.jit
def _share_kernel(out, a, b, c, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, share(tl.load(a + at), tl.load(b + at), tl.load(c + at)))


@triton.jit
def _drawn_kernel(out, a, b, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, drawn(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _uniform_kernel(out, a, b, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, uniform_bits(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _key_kernel(out, back, x, n: tl.constexpr):
    at = tl.arange(0, n)
    keys = key(tl.load(x + at))
    tl.store(out + at, keys)
    tl.store(back + at, value(keys))


def computed(kernel: Callable, *columns: list[int]) -> list[int]:
    size = 256
    padded = [torch.tensor(column + [column[0]] * (size - len(column)), device=DEVICE) for column in columns]
    out = torch.empty(size, dtype=torch.int64, device=DEVICE)
    kernel[(1,)](out, *padded, n=size)
    return out[: len(columns[0])].tolist()


def test_shares_are_exact() -> None:
    choose = random.Random(1)
    fractions = [0.1, 0.5, 0.9, 0.95, 1 - 2**-53, 1e-9, 1e-18, 2.0**-63, 2.0**-64, 2.0**-65, 3 * 2.0**-70]
    fractions += [choose.random() ** choose.choice([1, 4, 9]) for _ in range(180)]
    totals = [choose.randrange(1, 1 << choose.randrange(1, 59)) for _ in fractions]
    numerators, denominators = zip(*(fraction.as_integer_ratio() for fraction in fractions), strict=True)
    shifts = [denominator.bit_length() - 1 for denominator in denominators]
    assert max(shifts) <= 116
    expected = [max(1, _share(fraction, total)) for fraction, total in zip(fractions, totals, strict=True)]
    assert computed(_share_kernel, list(numerators), shifts, totals) == expected


def test_draws_are_exact() -> None:
    choose = random.Random(2)
    bits = [0, 1, 2**24 - 1, *(choose.getrandbits(24) for _ in range(200))]
    kept = [choose.randrange(1 << choose.randrange(25, 59)) for _ in bits]
    assert computed(_drawn_kernel, bits, kept) == [a * b >> 24 for a, b in zip(bits, kept, strict=True)]


def test_uniforms_are_the_hosts() -> None:
    choose = random.Random(3)
    seeds = [0, 2**64 - 1, 2**63, *(choose.getrandbits(64) for _ in range(100))]
    indices = [0, 2**31 - 1, 1, *(choose.randrange(1 << 20) for _ in range(100))]
    signed = np.array(seeds, dtype=np.uint64).view(np.int64).tolist()
    assert computed(_uniform_kernel, signed, indices) == [*map(host_uniform_bits, seeds, indices)]


def test_keys_order_like_floats() -> None:
    x = torch.cat([torch.randn(250), torch.tensor([0.0, -0.0, 3.4e38, -3.4e38, 1e-45, -torch.inf])]).to(DEVICE)
    keys, back = torch.empty(256, dtype=torch.int64, device=DEVICE), torch.empty_like(x)
    _key_kernel[(1,)](keys, back, x, n=256)
    assert torch.equal(back, x)
    assert torch.equal(keys[:, None] < keys, x[:, None] < x)


# ---- rows by hand


def inputs_of(rows: list[dict[str, object]], entries: list[tuple[int, float, int, int]] = ()) -> SamplerInputs:
    filled = np.zeros(len(rows), ROW)
    for row, fields in zip(filled, rows, strict=True):
        for name, wanted in fields.items():
            row[name] = wanted
    # The last entry is nobody's: an id that no logit has.
    all_entries = np.array([*entries, (1 << 30, np.nan, 1 << 30, 3)], dtype=ENTRY)
    return SamplerInputs(
        torch.from_numpy(filled.view(np.int64).reshape(len(rows), -1)).to(DEVICE),
        torch.from_numpy(all_entries.view(np.int32).reshape(len(all_entries), -1)).to(DEVICE),
    )


def sampled(logits: Tensor, inputs: SamplerInputs) -> tuple[list[int], list[float], list[int]]:
    before = logits.clone()
    result = sample_logits(logits, inputs, CONFIGS)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    return result.tokens.tolist(), result.logprobs.tolist(), result.finite.tolist()


def test_argmax_gives_the_lowest_of_equals() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (3, 300), generator=generator).float().to(DEVICE)
    logits[logits == 0] = -0.0
    logits[2] = -0.0
    logits[2, 200:] = 0.0
    tokens, logprobs, finite = sampled(logits, inputs_of([{}, {"needs_logprob": 1}, {}]))
    assert tokens == [row.index(max(row)) for row in logits.tolist()]
    assert finite == [1, 1, 1]
    assert logprobs[0] == 0
    assert logprobs[1] == pytest.approx(torch.log_softmax(logits[1].double(), 0)[tokens[1]].item(), rel=1e-7)


def test_equal_logits_are_drawn_in_the_order_of_ids() -> None:
    """Draw number r of V equal weights is the id r, whatever the list is cut into."""
    vocab = 300
    rows = [{"temperature": 1.0, "seed": seed, "index": 7} for seed in range(3)]
    tokens, _, _ = sampled(torch.full((3, vocab), -3.5, device=DEVICE), inputs_of(rows))
    assert tokens == [host_uniform_bits(seed, 7) * vocab >> 24 for seed in range(3)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_said_to_be(bad: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 200, generator=generator).to(DEVICE)
    biased = {"temperature": 1.0, "repetition": 1.0, "end_entry": 1}
    inputs = inputs_of([biased, {"temperature": 1.0}, {}], [(5, 1.0, 0, 0)])
    healthy = sampled(logits, inputs)
    logits[0, 199] = bad
    logits[2, 3] = bad
    tokens, _, finite = sampled(logits, inputs)
    assert finite == [0, 1, 0]
    assert tokens == [0, healthy[0][1], 0]


def test_a_list_that_is_too_long_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 150, generator=generator).to(DEVICE)
    rows = [{"temperature": 0.9, "seed": 5, "top_k": 100}, {"temperature": 3.0, "top_p": 3, "top_p_shift": 2}]
    listed = sampled(logits, inputs_of(rows))
    for module in ("kernels.sampler.select", "kernels.sampler.finish"):
        monkeypatch.setattr(f"{module}.LIST_LENGTH", tl.constexpr(1))
    assert sampled(logits, inputs_of(rows)) == listed


def test_what_does_not_fit_is_refused() -> None:
    inputs = SamplerInputs.allocate(2, 4, DEVICE)
    with pytest.raises(ValueError, match="rows has shape"):
        sample_logits(torch.zeros(3, 40, device=DEVICE), inputs, CONFIGS)
    with pytest.raises(ValueError, match="the vocabulary is 8193, not 1 to 8192"):
        sample_logits(torch.zeros(2, 8193, device=DEVICE), inputs, CONFIGS)
    with pytest.raises(ValueError, match="strides"):
        sample_logits(torch.zeros(2, 80, device=DEVICE)[:, ::2], inputs, CONFIGS)
    assert len(sample_logits(torch.zeros(0, 40, device=DEVICE), inputs.first(0), CONFIGS).tokens) == 0
