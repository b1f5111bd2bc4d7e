"""Mixture of experts for bf16 rows: grouped products of bf16 or block-FP8 experts, and the weighted sum of a row.

A tile of the product is BLOCK output columns of an expert times the TILE rows of one tile of slots: weights are the
tensor core's rows, so a TILE of a few rows costs no more than one row and wgmma runs in both roles. A row's product
does not depend on its slot or tile, so its bits do not either. Results lie by pair (row * A + choice), not by slot.

The decode role reads each touched expert once, whatever the batch: 6 * D * width bytes an expert in bf16 bound it. The
prefill role does 6 * D * width operations a pair, plus those for the slots that fill up each expert's last tile.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_contiguous, require_rows
from kernels.experts.grouping import Groups, Role, group_pairs
from kernels.experts.routing import MAX_CHOICES
from kernels.lang import dot, round_to, to_bf16
from kernels.products.bf16 import place
from kernels.products.definition import FP8_BLOCK
from kernels.products.fp8 import quantise_rows
from kernels.table import Config, KernelSource, KernelSources, lookup


@triton.jit
def _scales(at, block, num_blocks):
    """The scales of one block of K; past the last block, which a loop that reads ahead asks for, anything."""
    return tl.load(at + tl.minimum(block, num_blocks - 1))


@triton.jit
def experts_kernel(  # noqa: PLR0915
    out, x, x_scales, weights, weight_scales, slots, tile_experts, num_tiles,
    pairs_per_row, columns, K, x_stride, x_scales_stride,
    SWIGLU: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[pair, column] = x[pair // pairs_per_row] . weights[expert, column], or with SWIGLU the rows after `columns`
    too: silu(x . gate[column]) * (x . up[column]). With scales: e4m3, a scale for every BLOCK_K elements of a row.
    """
    tiles = tl.load(num_tiles)
    if tl.program_id(0) >= tiles * tl.cdiv(columns, BLOCK):
        return
    # Tiles of one expert are neighbours: they find its weights in L2.
    tile, column_block = place(tiles * TILE, columns, TILE, BLOCK, GROUP)
    column = column_block * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(slots + tile * TILE + tl.arange(0, TILE))
    used = pair >= 0
    x_row = tl.where(used, pair // pairs_per_row, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    matrix_row = tl.load(tile_experts + tile).to(tl.int64) * columns * (2 if SWIGLU else 1)
    weight_row = tl.minimum(column, columns - 1)  # columns past the last repeat it and are not stored
    x_at = x + x_row[:, None] * x_stride + k[None, :]
    weight_at = weights + matrix_row * K + weight_row[:, None] * K + k[None, :]
    acc = tl.zeros([BLOCK, TILE], tl.float32)
    up = tl.zeros([BLOCK, TILE], tl.float32)
    zero = tl.zeros([BLOCK, TILE], tl.float32)
    if x_scales is not None:
        num_scales = tl.cdiv(K, BLOCK_K)
        x_scale_at = x_scales + x_row * x_scales_stride
        scale_at = weight_scales + (matrix_row + weight_row) * num_scales
        # Read a block ahead: they feed no product, so the compiler does not pipeline them.
        next_scale = tl.load(scale_at)
        if SWIGLU:
            next_up_scale = tl.load(scale_at + columns * num_scales)
    for start in range(0, K, BLOCK_K):
        inside = (start + k < K)[None, :]
        weight = tl.load(weight_at + start, mask=inside, other=0.0)
        x_k = tl.trans(tl.load(x_at + start, mask=used[:, None] & inside, other=0.0))
        if SWIGLU:
            up_weight = tl.load(weight_at + columns * K + start, mask=inside, other=0.0)
        if x_scales is None:
            acc = dot(weight, x_k, acc)
            if SWIGLU:
                up = dot(up_weight, x_k, up)
        else:
            block = start // BLOCK_K + 1
            x_scale = tl.load(x_scale_at + start // BLOCK_K)
            scale = next_scale
            next_scale = _scales(scale_at, block, num_scales)
            acc += dot(weight, x_k, zero) * x_scale[None, :] * scale[:, None]
            if SWIGLU:
                up_scale = next_up_scale
                next_up_scale = _scales(scale_at + columns * num_scales, block, num_scales)
                up += dot(up_weight, x_k, zero) * x_scale[None, :] * up_scale[:, None]
    if SWIGLU:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    out_at = out + pair.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out_at, tl.trans(to_bf16(acc)), mask=used[:, None] & (column < columns)[None, :])


@triton.jit
def combine_kernel(
    out, y, weights, shared, num_real_rows, width, shared_stride, CHOICES: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (row, block): the row's experts times their weights, added in order; then the shared expert's row."""
    row = tl.program_id(0)
    real = row >= 0
    if num_real_rows is not None:
        real = row < tl.load(num_real_rows)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for c in tl.static_range(CHOICES):
        pair = row.to(tl.int64) * CHOICES + c
        weight = tl.load(weights + pair, mask=real, other=0.0)
        value = tl.load(y + pair * width + column, mask=real & (column < width), other=0.0)
        total += value.to(tl.float32) * weight
    if shared is not None:
        at = shared + row.to(tl.int64) * shared_stride + column
        total = to_bf16(total).to(tl.float32) + tl.load(at, mask=column < width, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * width + column, round_to(total, out.dtype.element_ty), mask=column < width)


class Fp8Matrix(NamedTuple):
    """The experts' matrices in block-FP8."""

    weight: Tensor  # e4m3 [E, out, in]
    scales: Tensor  # fp32 [E, out, ceil(in / FP8_BLOCK)], one for each row and FP8_BLOCK elements


def experts(
    x_ND: Tensor, weights_NA: Tensor, ids_NA: Tensor, gate_up: Tensor | Fp8Matrix, down: Tensor | Fp8Matrix,
    num_real_rows: Tensor | None = None, *,
    role: Role, shared_ND: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`definition.expert_mlps`: the weighted sum of each row's experts, [N, D] fp32; their outputs are rounded to bf16.

    With `shared_ND` (bf16) or out_dtype bf16: the sum rounded to bf16, the shared expert's output added and rounded.
    `gate_up` is [E, 2 * width, D], gate first, `down` [E, D, width]. The sum is zero for rows from `num_real_rows`
    (int32 [1] on the device; None: all are real) on, whose ids and weights are not looked at; those of other rows must
    name experts. Nothing waits for the device. Raises ValueError, UnsupportedKernel.
    """
    num_rows, width, columns = _require(x_ND, weights_NA, ids_NA, gate_up, down, num_real_rows)
    bf16 = shared_ND is not None or out_dtype == torch.bfloat16
    out_ND = x_ND.new_empty(num_rows, columns, dtype=torch.bfloat16 if bf16 else torch.float32)
    if not num_rows:
        return out_ND
    weights = "fp8" if isinstance(gate_up, Fp8Matrix) else "bf16"
    variants = f"role={role},weights={weights},product="
    first, second = (lookup("moe_experts", variants + product, x_ND.device) for product in ("gate_up", "down"))
    num_experts = _weight(gate_up).shape[0]
    groups = group_pairs(ids_NA, num_real_rows, num_experts, first.constants["TILE"], role=role)
    choices = ids_NA.shape[1]
    hidden_PW = x_ND.new_empty(num_rows * choices, width)
    y_PD = x_ND.new_empty(num_rows * choices, columns)
    _product(hidden_PW, x_ND, gate_up, groups, choices, first)
    _product(y_PD, hidden_PW, down, groups, 1, second)
    combine(out_ND, y_PD, weights_NA, shared_ND, num_real_rows)
    return out_ND


def _product(
    out_PM: Tensor, x: Tensor, matrix: Tensor | Fp8Matrix, groups: Groups, pairs_per_row: int, config: Config
) -> None:
    """One of the two products; SwiGLU where the matrix has twice as many rows as `out_PM` columns."""
    x_scales = None
    weight_scales = None
    scales_stride = 0
    if isinstance(matrix, Fp8Matrix):
        x, x_scales = quantise_rows(x)
        weight_scales = matrix.scales
        scales_stride = x_scales.stride(0)
    columns = out_PM.shape[1]
    grid = (groups.tile_experts_T.shape[0] * triton.cdiv(columns, config.constants["BLOCK"]),)
    swiglu = _weight(matrix).shape[1] == 2 * columns
    operands = (out_PM, x, x_scales, _weight(matrix), weight_scales, *groups)
    numbers = (pairs_per_row, columns, x.shape[1], x.stride(0), scales_stride)
    experts_kernel[grid](*operands, *numbers, swiglu, **config.launch)


def combine(
    out_ND: Tensor, y_PD: Tensor, weights_NA: Tensor, shared_ND: Tensor | None, num_real_rows: Tensor | None
) -> None:
    """The sum of y[n * A + a] * weights[n, a] over a, in order, into out_ND (fp32 or bf16); see `experts`."""
    num_rows, width = out_ND.shape
    if shared_ND is not None:
        require("shared_ND", shared_ND, (num_rows, width), torch.bfloat16)
        require_rows("shared_ND", shared_ND)
    config = lookup("moe_combine", f"out={'bf16' if out_ND.dtype == torch.bfloat16 else 'fp32'}", out_ND.device)
    grid = (num_rows, triton.cdiv(width, config.constants["BLOCK"]))
    shared_stride = 0 if shared_ND is None else shared_ND.stride(0)
    operands = (out_ND, y_PD, weights_NA, shared_ND, num_real_rows, width, shared_stride)
    combine_kernel[grid](*operands, weights_NA.shape[1], **config.launch)


def _weight(matrix: Tensor | Fp8Matrix) -> Tensor:
    return matrix.weight if isinstance(matrix, Fp8Matrix) else matrix


def _require(
    x_ND: Tensor, weights_NA: Tensor, ids_NA: Tensor, gate_up: Tensor | Fp8Matrix, down: Tensor | Fp8Matrix,
    num_real_rows: Tensor | None,
) -> tuple[int, int, int]:  # fmt: skip
    """(rows, width of an expert, D). Raises ValueError."""
    require("x_ND", x_ND, (None, None), torch.bfloat16)
    require_rows("x_ND", x_ND)
    require("weights_NA", weights_NA, (x_ND.shape[0], None), torch.float32)
    require("ids_NA", ids_NA, tuple(weights_NA.shape), torch.int32)
    require_contiguous("weights_NA", weights_NA)
    require_contiguous("ids_NA", ids_NA)
    if ids_NA.shape[1] > MAX_CHOICES:
        raise ValueError(f"ids_NA has {ids_NA.shape[1]} choices, more than {MAX_CHOICES}")
    if num_real_rows is not None:
        require("num_real_rows", num_real_rows, (1,), torch.int32)
    if isinstance(gate_up, Fp8Matrix) != isinstance(down, Fp8Matrix):
        raise ValueError("gate_up and down must both be bf16 or both be Fp8Matrix")
    num_experts, columns, width = _weight(down).shape
    _require_matrix("gate_up", gate_up, (num_experts, 2 * width, columns))
    _require_matrix("down", down, (num_experts, x_ND.shape[1], width))
    return x_ND.shape[0], width, columns


def _require_matrix(name: str, matrix: Tensor | Fp8Matrix, shape: tuple[int, int, int]) -> None:
    fp8 = isinstance(matrix, Fp8Matrix)
    weight = _weight(matrix)
    require(name, weight, shape, torch.float8_e4m3fn if fp8 else torch.bfloat16)
    require_contiguous(name, weight)
    if weight.data_ptr() % 16 or shape[1] % 16 or shape[2] % 16 or shape[1] * shape[2] >= 2**31:
        raise ValueError(f"{name} is {shape} at {weight.data_ptr():#x}: not multiples of 16, or over 2**31 elements")
    if isinstance(matrix, Fp8Matrix):
        require(f"{name}.scales", matrix.scales, (*shape[:2], triton.cdiv(shape[2], FP8_BLOCK)), torch.float32)
        require_contiguous(f"{name}.scales", matrix.scales)


def _experts_source(fields: Mapping[str, str]) -> KernelSource:
    fp8 = fields["weights"] == "fp8"
    operand = "*fp8e4nv" if fp8 else "*bf16"
    signature = {"out": "*bf16", "x": operand, "weights": operand}
    signature |= dict.fromkeys(("slots", "tile_experts", "num_tiles"), "*i32")
    signature |= dict.fromkeys(("pairs_per_row", "columns", "K", "x_stride", "x_scales_stride"), "i32")
    constants: dict[str, object] = {"SWIGLU": fields["product"] == "gate_up"}
    if fp8:
        signature |= {"x_scales": "*fp32", "weight_scales": "*fp32"}
    else:
        constants |= {"x_scales": None, "weight_scales": None}
    return KernelSource(
        experts_kernel,
        signature,
        constants,
        tuple(name for name in signature if name not in ("pairs_per_row", "x_scales_stride")),
    )


def _combine_source(fields: Mapping[str, str]) -> KernelSource:
    pointers = {"out": f"*{fields['out']}", "y": "*bf16", "weights": "*fp32", "num_real_rows": "*i32"}
    numbers = {"width": "i32", "shared_stride": "i32"}
    constants: dict[str, object] = {"CHOICES": MAX_CHOICES}
    if fields["out"] == "bf16":
        pointers["shared"] = "*bf16"
    else:
        constants["shared"] = None
    return KernelSource(combine_kernel, {**pointers, **numbers}, constants, (*pointers, "width", "shared_stride"))


SOURCES: KernelSources = {"moe_experts": _experts_source, "moe_combine": _combine_source}
