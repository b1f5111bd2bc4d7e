"""What a step puts into the cache: normalised latents and the rotated key, fused; and the rotation of queries.

Cached rows are bf16 [latent | rotated key], or the 8-bit rows of `definition`. The rotation is `definition.rotate` in
fp32, rounded once; its pairs are element i and i + R / 2.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_contiguous, require_rows
from kernels.lang import INTERPRETED, to_bf16
from kernels.latents.definition import GROUP, fp8_row_bytes
from kernels.table import Config, KernelSource, KernelSources, lookup

_ROUND_BY_HAND = tl.constexpr(INTERPRETED)
_GROUP = tl.constexpr(GROUP)


@triton.jit
def to_e4m3_bits(x):
    """fp32 to the byte of the nearest e4m3, ties to even, at most 448 in magnitude; NaN stays NaN."""
    if _ROUND_BY_HAND:  # the interpreter gets values below 2**-6 wrong
        magnitude = tl.abs(x)
        bits = magnitude.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF  # fp32 has steps of 2**-9 there
        code = tl.where(magnitude < 0.015625, small, tl.minimum(normal, 0x7E))
        code = tl.where(x == x, code, 0x7F) | ((x.to(tl.uint32, bitcast=True) >> 24) & 0x80)
        byte = code.to(tl.uint8)
    else:
        byte = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return byte


@triton.jit
def _rotate(first, second, cos, signed_sin, angle, HALF: tl.constexpr):
    """Both halves rotated, in fp32; `angle` points at the first half's elements of a table row."""
    first_cos = tl.load(cos + angle).to(tl.float32)
    second_cos = tl.load(cos + angle + HALF).to(tl.float32)
    first_sin = tl.load(signed_sin + angle).to(tl.float32)
    second_sin = tl.load(signed_sin + angle + HALF).to(tl.float32)
    return first * first_cos + second * first_sin, second * second_cos + first * second_sin


@triton.jit
def store_latents_kernel(
    cache_bf16,
    cache_u8,
    cache_fp32,
    qkv,
    weight,
    cos,
    signed_sin,
    positions,
    slots,
    qkv_stride,
    latent_start,
    row_bytes,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    FP8: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program per row; the latent as [GROUPS, 128], GROUPS a power of two.

    The three cache pointers are one address: which elements of a row are of which type is said in `definition`.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        source = qkv + row * qkv_stride + latent_start
        group = tl.arange(0, GROUPS)
        column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        inside = column < C
        value = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt_rn(tl.sum(value * value) / C + eps)
        gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        latent = to_bf16(to_bf16(value * scale).to(tl.float32) * gain)

        i = tl.arange(0, R // 2)
        first = tl.load(source + C + i).to(tl.float32)
        second = tl.load(source + C + R // 2 + i).to(tl.float32)
        angle = tl.load(positions + row).to(tl.int64) * R + i
        first, second = _rotate(first, second, cos, signed_sin, angle, R // 2)

        if FP8:
            # Exponents are exact where a division need not be: 448 is 1.75 * 2**8.
            latent = latent.to(tl.float32)
            bits = tl.max(tl.abs(latent), axis=1).to(tl.uint32, bitcast=True)
            exponent = (bits >> 23).to(tl.int32) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
            exponent = tl.where(bits == 0, 127, tl.maximum(exponent, 1))
            inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
            target = slot * row_bytes
            tl.store(cache_u8 + target + column, to_e4m3_bits(latent * inverse[:, None]), mask=inside)
            scales = cache_fp32 + (target + C) // 4
            tl.store(scales + group, (exponent << 23).to(tl.float32, bitcast=True), mask=group * _GROUP < C)
            rope = cache_bf16 + (target + C + (C + _GROUP - 1) // _GROUP * 4) // 2
        else:
            target = slot * (row_bytes // 2)
            tl.store(cache_bf16 + target + column, latent, mask=inside)
            rope = cache_bf16 + target + C
        tl.store(rope + i, to_bf16(first))
        tl.store(rope + R // 2 + i, to_bf16(second))


@triton.jit
def rotate_queries_kernel(
    out,
    q,
    cos,
    signed_sin,
    positions,
    num_heads,
    q_row_stride,
    q_head_stride,
    out_row_stride,
    out_head_stride,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Program (row, BLOCK_H heads). `out` may be `q`: everything is read before anything is written."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    i = tl.arange(0, R // 2)[None, :]
    inside = head < num_heads
    source = q + row * q_row_stride + head.to(tl.int64) * q_head_stride + i
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + R // 2, mask=inside, other=0.0).to(tl.float32)
    position = tl.maximum(tl.load(positions + row), 0)  # padding rows have -1
    first, second = _rotate(first, second, cos, signed_sin, position.to(tl.int64) * R + i, R // 2)
    target = out + row * out_row_stride + head.to(tl.int64) * out_head_stride + i
    tl.debug_barrier()
    tl.store(target, to_bf16(first), mask=inside)
    tl.store(target + R // 2, to_bf16(second), mask=inside)


def store_latents(
    qkv_NX: Tensor,
    norm_weight_C: Tensor,
    eps: float,
    cos: Tensor,
    signed_sin: Tensor,
    positions_N: Tensor,
    slots_N: Tensor,
    cache: Tensor,
    *,
    latent_start: int,
    config: Config | None = None,
) -> None:
    """Norm of columns [latent_start, +C), rotation of the R after them, and both into each row's slot of the cache.

    `qkv_NX` bf16 rows; tables [context, R] fp32 or bf16; positions int32; slots int64, -1: not stored. `cache` is
    [blocks, block_size, C + R] bf16 or [blocks, block_size, bytes] uint8, contiguous. A slot named twice: either row.
    """
    latent_rank = norm_weight_C.shape[0]
    rope = cos.shape[1]
    num_rows = qkv_NX.shape[0]
    stored_as = "fp8" if cache.dtype == torch.uint8 else "bf16"
    row_elements = fp8_row_bytes(latent_rank, rope) if stored_as == "fp8" else latent_rank + rope
    require("qkv_NX", qkv_NX, (None, None), torch.bfloat16)
    require_rows("qkv_NX", qkv_NX)
    require("norm_weight_C", norm_weight_C, (None,), torch.bfloat16)
    _require_tables(cos, signed_sin, positions_N, num_rows)
    require("slots_N", slots_N, (num_rows,), torch.int64)
    require("cache", cache, (None, None, row_elements), torch.bfloat16, torch.uint8)
    require_contiguous("cache", cache)
    if latent_start % 8 or not 0 <= latent_start <= qkv_NX.shape[1] - latent_rank - rope:
        raise ValueError(f"latent_start is {latent_start}: no multiple of 8 that leaves {latent_rank} + {rope} columns")
    if num_rows:
        variant = f"latent={latent_rank},rope={rope},rows={stored_as},tables={_table_type(cos)}"
        config = config or lookup("store_latents", variant, cache.device)
        views = [cache.view(type) for type in (torch.bfloat16, torch.uint8)]
        views.append(cache.view(torch.float32) if stored_as == "fp8" else views[0])
        operands = (*views, qkv_NX, norm_weight_C, cos, signed_sin, positions_N, slots_N)
        sizes = (qkv_NX.stride(0), latent_start, row_elements * cache.element_size(), eps)
        constants = _constants(latent_rank, rope, stored_as)
        store_latents_kernel[(num_rows,)](*operands, *sizes, **constants, **config.launch)


def rotate_queries(
    q_NHK: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    positions_N: Tensor,
    out_NHR: Tensor,
    *,
    nope: int,
    config: Config | None = None,
) -> None:
    """The R elements after `nope` of every head, rotated, into `out_NHR`, which may be that part of `q_NHK` itself.

    bf16, any strides but the last; tables as in `store_latents`. A row at position -1 gets values without meaning.
    """
    num_rows, num_heads = q_NHK.shape[:2]
    rope = cos.shape[1]
    require("q_NHK", q_NHK, (None, None, nope + rope), torch.bfloat16)
    q_NHR = q_NHK[..., nope:]
    require_rows("q_NHK", q_NHR)
    require("out_NHR", out_NHR, (num_rows, num_heads, rope), torch.bfloat16)
    require_rows("out_NHR", out_NHR)
    _require_tables(cos, signed_sin, positions_N, num_rows)
    if num_rows:
        config = config or lookup("rotate_queries", f"rope={rope},tables={_table_type(cos)}", q_NHK.device)
        strides = (*q_NHR.stride()[:2], *out_NHR.stride()[:2])
        grid = (num_rows, triton.cdiv(num_heads, config.constants["BLOCK_H"]))
        operands = (out_NHR, q_NHR, cos, signed_sin, positions_N, num_heads)
        rotate_queries_kernel[grid](*operands, *strides, R=rope, **config.launch)


def _require_tables(cos: Tensor, signed_sin: Tensor, positions_N: Tensor, num_rows: int) -> None:
    require("cos", cos, (None, None), torch.float32, torch.bfloat16)
    require("signed_sin", signed_sin, tuple(cos.shape), cos.dtype)
    require_contiguous("cos", cos)
    require_contiguous("signed_sin", signed_sin)
    require("positions_N", positions_N, (num_rows,), torch.int32)


def _table_type(table: Tensor) -> str:
    return "fp32" if table.dtype == torch.float32 else "bf16"


def _constants(latent_rank: int, rope: int, stored_as: str) -> dict[str, Any]:
    groups = triton.next_power_of_2(triton.cdiv(latent_rank, GROUP))
    return {"C": latent_rank, "R": rope, "FP8": stored_as == "fp8", "GROUPS": groups}


def _store_source(fields: Mapping[str, str]) -> KernelSource:
    tables = {"cos": f"*{fields['tables']}", "signed_sin": f"*{fields['tables']}"}
    signature = {
        **{"cache_bf16": "*bf16", "cache_u8": "*u8", "cache_fp32": "*fp32", "qkv": "*bf16", "weight": "*bf16"},
        **{**tables, "positions": "*i32", "slots": "*i64", "qkv_stride": "i32", "latent_start": "i32"},
        **{"row_bytes": "i32", "eps": "fp32"},
    }
    if fields["rows"] == "bf16":
        signature["cache_fp32"] = "*bf16"
    constants = _constants(int(fields["latent"]), int(fields["rope"]), fields["rows"])
    wide = ["row_bytes"] if fields["latent"] == "512" else []
    pointers = [name for name, type in signature.items() if type[0] == "*"]
    return KernelSource(store_latents_kernel, signature, constants, (*pointers, "qkv_stride", "latent_start", *wide))


def _rotate_source(fields: Mapping[str, str]) -> KernelSource:
    tables = {"cos": f"*{fields['tables']}", "signed_sin": f"*{fields['tables']}"}
    strides = ("q_row_stride", "q_head_stride", "out_row_stride", "out_head_stride")
    signature = {"out": "*bf16", "q": "*bf16", **tables, "positions": "*i32", "num_heads": "i32"}
    signature |= dict.fromkeys(strides, "i32")
    return KernelSource(rotate_queries_kernel, signature, {"R": int(fields["rope"])}, ("out", "q", *tables, *strides))


SOURCES: KernelSources = {"store_latents": _store_source, "rotate_queries": _rotate_source}
