"""Rows put into the cache, bf16 and 8-bit, and rotated queries; nothing but the named slots is written."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.elementwise.definition import rms_norm
from kernels.latents.definition import dequantise_latents, fp8_row_bytes, quantise_latents, rotate
from kernels.latents.store import rotate_queries, store_latents, to_e4m3_bits

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(512, 64, 1536), (64, 16, 96)]
POSITIONS, SLOTS = [5, 0, 39, 5, -1, 2], [7, 31, 0, -1, -1, 12]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tables(rope: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angles = random(40, rope // 2, seed=3)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), 1).to(dtype), torch.cat((-sin, sin), 1).to(dtype)


def index(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def rotated(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    at = positions.clamp(min=0).long()
    return rotate(x.float(), cos[at].float(), signed_sin[at].float()).to(BF16)


def stored(qkv: torch.Tensor, weight: torch.Tensor, cache: torch.Tensor, first: int, rope: int, rows: slice) -> None:
    cos, signed_sin = tables(rope, torch.float32)
    positions, slots = index(POSITIONS, torch.int32)[rows], index(SLOTS, torch.int64)[rows]
    store_latents(qkv[rows], weight, 1e-6, cos, signed_sin, positions, slots, cache, latent_start=first)


@pytest.mark.parametrize(("latent", "rope", "first"), SHAPES)
def test_bf16_rows_are_the_definition(latent: int, rope: int, first: int) -> None:
    qkv, weight = random(6, first + latent + rope).to(BF16), random(latent, seed=1).to(BF16)
    qkv[:, :first] = torch.nan
    cache = torch.full((2, 16, latent + rope), torch.nan, dtype=BF16, device=DEVICE)
    stored(qkv, weight, cache, first, rope, slice(None))
    rows = cache.flatten(0, 1)
    expected = rms_norm(qkv[:, first : first + latent], weight, eps=1e-6)
    pe = rotated(qkv[:, first + latent :], *tables(rope, torch.float32), index(POSITIONS, torch.int32))
    for row, slot in enumerate(SLOTS):
        if slot >= 0:
            torch.testing.assert_close(rows[slot, :latent], expected[row], rtol=2**-7, atol=1e-30)
            torch.testing.assert_close(rows[slot, latent:], pe[row], rtol=2**-7, atol=1e-6)
    written = rows.isfinite().any(1).nonzero().flatten().tolist()
    assert written == sorted(slot for slot in SLOTS if slot >= 0)


@pytest.mark.parametrize(("latent", "rope", "first"), SHAPES)
def test_8_bit_rows_are_the_quantised_bf16_rows(latent: int, rope: int, first: int) -> None:
    qkv, weight = random(6, first + latent + rope).to(BF16), random(latent, seed=1).to(BF16)
    qkv[1, first : first + latent] = 0  # a scale of 1
    weight[::7] = 1e-4  # some below e4m3's smallest
    plain = torch.zeros(2, 16, latent + rope, dtype=BF16, device=DEVICE)
    small = torch.full((2, 16, fp8_row_bytes(latent, rope)), 0xA5, dtype=torch.uint8, device=DEVICE)
    stored(qkv, weight, plain, first, rope, slice(None))
    stored(qkv, weight, small, first, rope, slice(None))
    slots = [slot for slot in SLOTS if slot >= 0]
    same = small.flatten(0, 1)[slots] == quantise_latents(plain.flatten(0, 1)[slots], latent)
    # On a device the two variants may sum squares in another order: a few latents a step apart.
    assert same.all() or (DEVICE.type == "cuda" and same.float().mean() > 0.99)
    others = [slot for slot in range(32) if slot not in slots]
    assert (small.flatten(0, 1)[others] == 0xA5).all()
    alone = torch.zeros_like(small)
    for row in range(6):
        stored(qkv, weight, alone, first, rope, slice(row, row + 1))
    assert torch.equal(alone.flatten(0, 1)[slots], small.flatten(0, 1)[slots])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("heads", "nope", "rope"), [(16, 128, 64), (4, 48, 16), (20, 64, 64)])
def test_queries_in_place_and_elsewhere(heads: int, nope: int, rope: int, dtype: torch.dtype) -> None:
    q = random(6, heads, nope + rope).to(BF16)
    cos, signed_sin = tables(rope, dtype)
    positions = index(POSITIONS, torch.int32)
    elsewhere = torch.full((6, heads, 64 + rope), torch.nan, dtype=BF16, device=DEVICE)
    rotate_queries(q, cos, signed_sin, positions, elsewhere[..., 64:], nope=nope)
    expected = rotated(q[..., nope:], cos[:, None], signed_sin[:, None], positions)
    torch.testing.assert_close(elsewhere[..., 64:], expected, rtol=2**-7, atol=1e-6)
    assert elsewhere[..., :64].isnan().all()
    before = q.clone()
    rotate_queries(q, cos, signed_sin, positions, q[..., nope:], nope=nope)
    assert torch.equal(q[..., :nope], before[..., :nope])
    assert torch.equal(q[..., nope:], elsewhere[..., 64:])


@triton.jit
def encode(out, x, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(out + i, to_e4m3_bits(tl.load(x + i)))


def test_e4m3_of_every_code_every_tie_and_their_neighbours() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, ties, ties.nextafter(codes[1:]), ties.nextafter(codes[:-1])))
    x = torch.cat((x, -x, torch.tensor([torch.nan, 1e-30, -1e-30, 448.0])))
    padded = torch.nn.functional.pad(x, (0, 1024 - x.shape[0])).to(DEVICE)
    out = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
    encode[(1,)](out, padded, 1024)
    assert torch.equal(out & 0x7F, padded.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F)
    number = padded == padded
    assert torch.equal(out[number], padded.to(torch.float8_e4m3fn).view(torch.uint8)[number])


def test_scales_are_the_least_power_of_two_that_fits() -> None:
    rows = torch.zeros(4, 512 + 64, dtype=BF16)
    rows[0, 0], rows[1, 130], rows[2, 511], rows[3, 5] = 448.0, -450.0, 447.0 * 2**-20, 2.0**-133
    scales = quantise_latents(rows, 512)[:, 512:528].contiguous().view(torch.float32)
    expected = torch.ones(4, 4)
    expected[0, 0], expected[1, 1], expected[2, 3], expected[3, 0] = 1.0, 2.0, 2.0**-20, 2.0**-126
    assert torch.equal(scales, expected)
    noise = torch.randn(50, 576, generator=torch.Generator().manual_seed(1)).to(BF16)
    back = dequantise_latents(quantise_latents(noise, 512), 512)
    assert torch.equal(back[:, 512:], noise[:, 512:])
    assert ((back - noise).float().abs() <= noise.float().abs() / 16 + 2.0**-16).all()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a multiple of 128"):
        fp8_row_bytes(320, 64)
    cos, signed_sin = tables(16, torch.float32)
    qkv, weight = random(1, 80).to(BF16), random(64).to(BF16)
    cache, one = torch.zeros(1, 16, 80, dtype=BF16, device=DEVICE), index([0], torch.int32)
    with pytest.raises(ValueError, match="leaves 64 \\+ 16 columns"):
        store_latents(qkv, weight, 1e-6, cos, signed_sin, one, one.long(), cache, latent_start=16)
    with pytest.raises(ValueError, match="cache has shape"):
        store_latents(qkv, weight, 1e-6, cos, signed_sin, one, one.long(), cache[..., :64], latent_start=0)
