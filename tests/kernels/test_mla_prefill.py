"""Prefill attention against softmax in fp32, and bit for bit against itself: cuts, company, blocks, segments.

Cache rows nobody may read are NaN, and so is all memory that torch hands out uninitialised.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch

from kernels.attention_prefill.attend import paged_mla_prefill
from kernels.attention_prefill.definition import HeadShape
from kernels.attention_prefill.plan import PrefillPlan
from kernels.latents.definition import dequantise_latents, fp8_row_bytes, quantise_latents

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = HeadShape(num_heads=2, nope=48, rope=16, value=32, latent=64)
LARGE = HeadShape(num_heads=1, nope=128, rope=64, value=128, latent=512)
NOWHERE = 2**30  # a block id beyond any cache
Span = tuple[int, int]  # start and end of a chunk


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(x_NK: torch.Tensor, weight_MK: torch.Tensor, *, role: str) -> torch.Tensor:
    """Exact up to its one rounding, so a row's bits depend on nothing else."""
    assert role == "prefill"
    return (x_NK.cpu().double() @ weight_MK.cpu().double().T).to(BF16).to(x_NK.device)


class Prompt:
    """One prompt's queries, scales and cached rows, all of them a function of its seed."""

    def __init__(self, shape: HeadShape, length: int, seed: int, *, fp8: bool) -> None:
        self.q = random(length, shape.num_heads, shape.nope + shape.rope, seed=seed).to(BF16) * 2
        self.scale = random(length, seed=seed + 100).abs() * 0.1 + 0.05
        rows = random(length, shape.latent + shape.rope, seed=seed + 200).to(BF16)
        self.stored = quantise_latents(rows, shape.latent) if fp8 else rows
        self.rows = dequantise_latents(self.stored, shape.latent) if fp8 else rows


def kv_b(shape: HeadShape) -> torch.Tensor:
    width = shape.num_heads * (shape.nope + shape.value)
    return (random(width, shape.latent, seed=7) * shape.latent**-0.5).to(BF16)


def run(
    shape: HeadShape,
    work: Sequence[tuple[Prompt, Span]],
    *,
    block_size: int = 16,
    seed: int = 0,
    segment_tokens: int = 8192,
) -> list[torch.Tensor]:
    """Each chunk's [tokens, H, V]; the cache holds what is stored up to each chunk's end, in blocks by `seed`."""
    fp8 = work[0][0].stored.dtype == torch.uint8
    num_blocks = sum(-(-end // block_size) for _, (_, end) in work) + 3
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    width = fp8_row_bytes(shape.latent, shape.rope) if fp8 else shape.latent + shape.rope
    cache = torch.full((num_blocks, block_size, width), 0xFF if fp8 else torch.nan, dtype=work[0][0].stored.dtype)
    chunks = []
    for sequence, (start, end) in work:
        table = [order.pop() for _ in range(-(-end // block_size))]
        for position in range(end):
            cache[table[position // block_size], position % block_size] = sequence.stored[position]
        chunks.append((start, end - start, [*table, NOWHERE, -1]))
    plan = PrefillPlan.build(chunks, block_size, DEVICE, segment_tokens=segment_tokens)
    q = torch.cat([sequence.q[start:end] for sequence, (start, end) in work]).to(DEVICE)
    scale = torch.cat([sequence.scale[start:end] for sequence, (start, end) in work]).to(DEVICE)
    weight = kv_b(shape).to(DEVICE)
    out = paged_mla_prefill(q, scale, cache.to(DEVICE), plan, weight, shape=shape, linear=linear)
    return list(out.cpu().split([end - start for _, (start, end) in work]))


def expected(shape: HeadShape, sequence: Prompt, span: Span) -> torch.Tensor:
    start, end = span
    kv = linear(sequence.rows[:end, : shape.latent], kv_b(shape), role="prefill").float()
    k_nope, value = kv.unflatten(1, (shape.num_heads, -1)).split((shape.nope, shape.value), dim=-1)
    k_pe = sequence.rows[:end, shape.latent :].float()
    q_nope, q_pe = sequence.q[start:end].float().split((shape.nope, shape.rope), dim=-1)
    scores = torch.einsum("nhd,thd->nht", q_nope, k_nope) + torch.einsum("nhr,tr->nht", q_pe, k_pe)
    scores = scores * sequence.scale[start:end, None, None]
    hidden = torch.arange(end)[None, :] > torch.arange(start, end)[:, None]
    weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
    return torch.einsum("nht,thv->nhv", weights, value)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("block_size", [16, 64])
def test_is_attention(block_size: int, fp8: bool) -> None:
    spans = [(0, 1), (0, 200), (131, 140), (64, 65)]
    work = [(Prompt(SMALL, 200, seed, fp8=fp8), span) for seed, span in enumerate(spans)]
    for out, (sequence, span) in zip(run(SMALL, work, block_size=block_size), work, strict=True):
        torch.testing.assert_close(out.float(), expected(SMALL, sequence, span), rtol=2e-2, atol=1e-2)


def test_is_attention_in_the_large_shape() -> None:
    sequence = Prompt(LARGE, 140, 1, fp8=True)
    (out,) = run(LARGE, [(sequence, (3, 140))])
    torch.testing.assert_close(out.float(), expected(LARGE, sequence, (3, 140)), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("cuts", [[0, 1, 77, 140, 300], [0, 64, 128, 129, 300], [0, 299, 300]])
def test_a_prompt_cut_in_chunks_has_the_same_bits(cuts: list[int]) -> None:
    sequence = Prompt(SMALL, 300, 1, fp8=False)
    (whole,) = run(SMALL, [(sequence, (0, 300))])
    for span in pairwise(cuts):
        (part,) = run(SMALL, [(sequence, span)], seed=span[0])
        assert torch.equal(part, whole[span[0] : span[1]])


@pytest.mark.parametrize("fp8", [False, True])
def test_company_blocks_and_segments_change_no_bit(fp8: bool) -> None:
    spans = [(0, 130), (260, 270), (0, 3), (200, 270)]
    work = [(Prompt(SMALL, 270, seed, fp8=fp8), span) for seed, span in enumerate(spans)]
    alone = [run(SMALL, [one], seed=5)[0] for one in work]
    together = run(SMALL, work, block_size=64, seed=1, segment_tokens=300)
    backwards = run(SMALL, work[::-1], block_size=32, seed=2, segment_tokens=128)[::-1]
    for one, other, third in zip(alone, together, backwards, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_a_long_sequence_alone_is_cut_and_short_ones_are_not() -> None:
    table = list(range(100))
    plan = PrefillPlan.build([(0, 100, table), (250, 50, table), (600, 8, table)], 16, DEVICE, segment_tokens=300)
    assert [segment.slots_T.shape[0] for segment in plan.segments] == [100, 300, 256, 256, 96]
    fields = [segment.tiles[0].tolist() for segment in plan.segments]
    assert fields == [
        [0, 100, 0, 0, 100, 0, 0, 0],
        [100, 50, 250, 0, 300, 0, 0, 0],
        [150, 8, 600, 0, 256, 0, 1, 0],
        [150, 8, 600, 256, 512, 0, 1, 0],
        [150, 8, 600, 512, 608, 0, 0, 0],
    ]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="less than a key tile of 128"):
        PrefillPlan.build([(0, 1, [0])], 16, DEVICE, segment_tokens=64)
    with pytest.raises(ValueError, match="a chunk of 17 tokens at 0 with 1 blocks of 16"):
        PrefillPlan.build([(0, 17, [0])], 16, DEVICE)
    plan = PrefillPlan.build([(0, 2, [0])], 16, DEVICE)
    q, scale = torch.zeros(3, 2, 64, dtype=BF16, device=DEVICE), torch.ones(3, device=DEVICE)
    cache = torch.zeros(1, 16, 80, dtype=BF16, device=DEVICE)
    with pytest.raises(ValueError, match=r"q_NHK has shape \(3, 2, 64\), not \(2, 2, 64\)"):
        paged_mla_prefill(q, scale, cache, plan, kv_b(SMALL).to(DEVICE), shape=SMALL, linear=linear)
