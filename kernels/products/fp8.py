"""Row-exact block-FP8 products (e4m3) and the quantisation of their rows; definitions in `definition`.

An activation row has a scale for every FP8_BLOCK elements, so has a weight row. Each such block of K is one tensor core
product from zero, whose result, scaled, is added to an fp32 accumulator in order. sm_90 and sm_100 only: the table
has no other entries.

Shapes: N rows, K inputs, M outputs, B = ceil(K / FP8_BLOCK) blocks. K and M are multiples of 16.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_contiguous, require_rows
from kernels.lang import dot, round_to
from kernels.latents.store import to_e4m3_bits
from kernels.products.bf16 import Role, dtype_name, place, require_aligned, tiles, width
from kernels.products.definition import E4M3_MAX, FP8_BLOCK
from kernels.table import Config, KernelSource, KernelSources, lookup

_BLOCK = tl.constexpr(FP8_BLOCK)
_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def _quantise_rows(x, out_u8, scales, K, x_row, out_row, scales_row, BLOCKS: tl.constexpr):
    """BLOCKS blocks of one row. Programs: (N, tiles of blocks)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    values = tl.load(x + row * x_row + k, mask=k < K, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(values), axis=1)
    scale = tl.where(peak == 0.0, 1.0, tl.div_rn(peak, _MAX))
    tl.store(out_u8 + row * out_row + k, to_e4m3_bits(tl.div_rn(values, scale[:, None])), mask=k < K)
    tl.store(scales + row * scales_row + block, scale, mask=block * _BLOCK < K)


@triton.jit(do_not_specialize=["N"])
def _fp8_product(
    x,
    x_scales,
    weight,
    weight_scales,
    bias,
    out,
    N,
    K,
    M,
    num_biased,
    x_row,
    x_scales_row,
    weight_row,
    weight_scales_row,
    out_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[n, m] = sum over blocks b of (x_b[n] . weight_b[m]) * x_scales[n, b] * weight_scales[m, b], + bias[m]."""
    row_tile, column_tile = place(N, M, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, _BLOCK)
    row_exists = rows < N
    column_exists = columns < M

    x_tile = x + rows.to(tl.int64)[:, None] * x_row + k[None, :]
    weight_tile = weight + columns.to(tl.int64)[None, :] * weight_row + k[:, None]
    x_scale_of_row = x_scales + rows.to(tl.int64) * x_scales_row
    # Scales are read a block ahead: they feed no product, so the compiler does not pipeline them. Those of the weight
    # come as [M, 1] and are summed over that 1: a vector would be read in the accumulator's layout, by every thread.
    weight_scale_of_column = weight_scales + columns.to(tl.int64)[:, None] * weight_scales_row
    next_x_scale = tl.load(x_scale_of_row, mask=row_exists, other=0.0)
    next_weight_scale = tl.load(weight_scale_of_column, mask=column_exists[:, None], other=0.0)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, K, _BLOCK):
        x_scale = next_x_scale
        weight_scale = tl.sum(next_weight_scale, axis=1)
        x_scale_of_row += 1
        weight_scale_of_column += 1
        more = first + _BLOCK < K
        next_x_scale = tl.load(x_scale_of_row, mask=row_exists & more, other=0.0)
        next_weight_scale = tl.load(weight_scale_of_column, mask=column_exists[:, None] & more, other=0.0)
        x_k = tl.load(x_tile, mask=row_exists[:, None] & (k < K - first)[None, :], other=0.0)
        weight_k = tl.load(weight_tile, mask=(k < K - first)[:, None] & column_exists[None, :], other=0.0)
        part = dot(x_k, weight_k, tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32))
        acc += part * x_scale[:, None] * weight_scale[None, :]
        x_tile += _BLOCK
        weight_tile += _BLOCK

    acc += tl.load(bias + columns, mask=columns < num_biased, other=0.0).to(tl.float32)[None, :]
    out_tile = out + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(out_tile, round_to(acc, out.dtype.element_ty), mask=row_exists[:, None] & column_exists[None, :])


def quantise_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """`definition.quantise_rows` of bf16 rows, which may lie apart: e4m3 [N, K], fp32 [N, B]; their bits are the same.

    Raises ValueError for what does not fit by name and UnsupportedKernel where the table has no entry.
    """
    require("x_NK", x_NK, (None, None), torch.bfloat16)
    require_aligned(x_NK=x_NK)
    config = lookup("quantise_rows", "out=fp8", x_NK.device)
    N, K = x_NK.shape
    num_blocks = -(-K // FP8_BLOCK)
    out_NK = torch.empty(N, K, dtype=torch.float8_e4m3fn, device=x_NK.device)
    scales_NB = torch.empty(N, num_blocks, dtype=torch.float32, device=x_NK.device)
    strides = x_NK.stride(0), out_NK.stride(0), scales_NB.stride(0)
    grid = (N, -(-num_blocks // config.constants["BLOCKS"]))
    _quantise_rows[grid](x_NK, out_NK.view(torch.uint8), scales_NB, K, *strides, **config.launch)
    return out_NK, scales_NB


def fp8_linear(
    x_NK: Tensor,
    x_scales_NB: Tensor,
    weight_MK: Tensor,
    weight_scales_MB: Tensor,
    bias_M: Tensor | None = None,
    *,
    role: Role,
    out_dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None,
) -> Tensor:
    """`definition.fp8_linear`, + bias (bf16), [N, M] in `out_dtype` (bf16 or fp32), rounded once.

    Raises ValueError for what does not fit by name and UnsupportedKernel where the table has no entry.
    """
    require("weight_MK", weight_MK, (None, None), torch.float8_e4m3fn)
    M, K = weight_MK.shape
    num_blocks = -(-K // FP8_BLOCK)
    require("x_NK", x_NK, (None, K), torch.float8_e4m3fn)
    N = x_NK.shape[0]
    out_NM = torch.empty(N, M, dtype=out_dtype, device=x_NK.device)
    require_aligned(x_NK=x_NK, weight_MK=weight_MK, out_NM=out_NM)
    for name, tensor, rows in (("x_scales_NB", x_scales_NB, N), ("weight_scales_MB", weight_scales_MB, M)):
        require(name, tensor, (rows, num_blocks), torch.float32)
        require_contiguous(name, tensor)
    bias = x_scales_NB.view(torch.bfloat16)  # without one, any address will do
    num_biased = 0
    if bias_M is not None:
        require("bias_M", bias_M, (M,), torch.bfloat16)
        require_rows("bias_M", bias_M)
        bias = bias_M
        num_biased = M
    variant = f"role={role},width={width(role, M)},out={dtype_name(out_dtype)}"
    config = config or lookup("fp8_linear", variant, x_NK.device)
    _fp8_product[(tiles(config, N, M),)](
        *(x_NK, x_scales_NB, weight_MK, weight_scales_MB, bias, out_NM, N, K, M, num_biased),
        *(x_NK.stride(0), x_scales_NB.stride(0), weight_MK.stride(0), weight_scales_MB.stride(0), out_NM.stride(0)),
        **config.launch,
    )
    return out_NM


def _quantise_source(_: Mapping[str, str]) -> KernelSource:
    pointers = {"x": "*bf16", "out_u8": "*u8", "scales": "*fp32"}
    signature = {**pointers, **dict.fromkeys("K x_row out_row scales_row".split(), "i32")}
    return KernelSource(_quantise_rows, signature, {}, (*pointers, "K", "x_row", "out_row"))


def _fp8_source(fields: Mapping[str, str]) -> KernelSource:
    scales = {"x_scales": "*fp32", "weight_scales": "*fp32"}
    pointers = {"x": "*fp8e4nv", "weight": "*fp8e4nv", "bias": "*bf16", "out": f"*{fields['out']}", **scales}
    sizes = "K M num_biased x_row weight_row out_row".split()
    numbers = dict.fromkeys(["N", *sizes, "x_scales_row", "weight_scales_row"], "i32")
    return KernelSource(_fp8_product, {**pointers, **numbers}, {}, (*pointers, *sizes))


SOURCES: KernelSources = {"quantise_rows": _quantise_source, "fp8_linear": _fp8_source}
