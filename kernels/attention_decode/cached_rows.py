"""How decode attention finds a tile's rows in the paged cache, and reads 8-bit ones (`kernels.latents.definition`)."""

import triton
import triton.language as tl

from kernels.lang import INTERPRETED, to_bf16

_INTERPRETED = tl.constexpr(INTERPRETED)
_DEQUANTISE: tl.constexpr = tl.constexpr("""{
.reg .b16 c<2>, h<4>; .reg .b32 p<2>; .reg .f32 f<4>;
mov.b32 {c0, c1}, $2;
cvt.rn.f16x2.e4m3x2 p0, c0;
cvt.rn.f16x2.e4m3x2 p1, c1;
mov.b32 {h0, h1}, p0;
mov.b32 {h2, h3}, p1;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
cvt.f32.f16 f2, h2;
cvt.f32.f16 f3, h3;
mul.f32 f0, f0, $3;
mul.f32 f1, f1, $4;
mul.f32 f2, f2, $5;
mul.f32 f3, f3, $6;
cvt.rn.bf16x2.f32 $0, f1, f0;
cvt.rn.bf16x2.f32 $1, f3, f2;
}""")


@triton.jit
def block_ids(table, n, keys, length, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of the tile at position n: one where a block holds whole tiles, else one a key."""
    if BLOCK_SIZE >= BLOCK_N:
        ids = tl.load(table + n // BLOCK_SIZE, mask=n < length, other=0)
    else:
        ids = tl.load(table + (n + keys) // BLOCK_SIZE, mask=n + keys < length, other=0)
    return ids


@triton.jit
def tile_slots(ids, n, keys, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Cache slots of the tile's keys, as a column."""
    if BLOCK_SIZE >= BLOCK_N:
        slots = ids.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE + keys
    else:
        slots = ids.to(tl.int64) * BLOCK_SIZE + (n + keys) % BLOCK_SIZE
    return slots[:, None]


@triton.jit
def tile_codes(bytes_ptr, scales_ptr, slots, visible, ROW: tl.constexpr, C: tl.constexpr):
    """A tile of 8-bit latents and their scales, as stored."""
    groups: tl.constexpr = (C + 127) // 128
    codes = tl.load(bytes_ptr + slots * ROW + tl.arange(0, C)[None, :], mask=visible, other=0)
    at = scales_ptr + slots * (ROW // 4) + C // 4 + tl.arange(0, groups)[None, :]
    return codes, tl.load(at, mask=visible, other=0.0)


@triton.jit
def dequantise(codes, scales):
    """The same tile in bf16: a scale is a power of two, so nothing is rounded."""
    grouped = tl.reshape(codes, [codes.shape[0], scales.shape[1], codes.shape[1] // scales.shape[1]])
    factors = tl.broadcast_to(scales[:, :, None], grouped.shape)
    if _INTERPRETED:
        values = to_bf16(grouped.to(tl.float8e4nv, bitcast=True).to(tl.float32) * factors)
    else:  # four at a time: the compiler alone keeps every value in a register of its own, and spills
        values = tl.inline_asm_elementwise(
            _DEQUANTISE, "=r,=r,r,r,r,r,r", [grouped, factors], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return tl.reshape(values, codes.shape)
