"""Work on rows of the residual stream: embedding, RMS norm with and without the addition before it, SwiGLU.

A norm is one program per row that holds the whole row, so its sum has one shape: the smallest of NORM_BLOCKS that fits.
Everything is computed in fp32 and rounded where `definition.rms_norm` and `definition.swiglu` round.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_rows
from kernels.lang import to_bf16
from kernels.table import Config, KernelSource, KernelSources, lookup

NORM_BLOCKS = (256, 2048, 8192)  # widest rows of a norm, each with its own entry in the table
_TILE = "block=1024"  # elements of a program of the kernels that sum nothing


@triton.jit
def embed_kernel(x, table, ids, vocab, width, table_stride, x_stride, scale, BLOCK: tl.constexpr):
    """Program (row, tile): the row of `table` that ids[row] names, times scale; zeros for an id outside the table."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids + row).to(tl.int64)
    inside = (id >= 0) & (id < vocab)
    value = tl.load(table + id * table_stride + column, mask=(column < width) & inside, other=0.0).to(tl.float32)
    tl.store(x + row * x_stride + column, to_bf16(value * scale), mask=column < width)


@triton.jit
def _normalise(x, weight, width, eps):
    """x / rms(x) as bf16, times weight, as bf16; elements of x past `width` are zero."""
    mean_square = tl.sum(x * x, axis=0) / width
    scale = 1.0 / tl.sqrt_rn(mean_square + eps)
    return to_bf16(to_bf16(x * scale).to(tl.float32) * weight)


@triton.jit
def rms_norm_kernel(out, x, weight, width, x_stride, out_stride, eps, BLOCK: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, _normalise(value, w, width, eps), mask=inside)


@triton.jit
def add_rms_norm_kernel(
    x_new, normed, x, delta, weight, width, x_stride, delta_stride, eps, scale, BLOCK: tl.constexpr
):
    """One program per row: x + scale * delta, rounded once, and its norm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = to_bf16(value + scale * added)
    tl.store(x_new + row * width + column, total, mask=inside)
    tl.store(normed + row * width + column, _normalise(total.to(tl.float32), w, width, eps), mask=inside)


@triton.jit
def swiglu_kernel(out, gate_up, width, in_stride, BLOCK: tl.constexpr):
    """Program (row, tile): silu(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, to_bf16(gate / (tl.exp(-gate) + 1.0) * up), mask=inside)


def embed(table_VD: Tensor, ids_N: Tensor, scale: float, *, config: Config | None = None) -> Tensor:
    """Rows of a bf16 table by int32 id, times `scale`, rounded once: [N, D]. An id outside the table gives zeros."""
    require("table_VD", table_VD, (None, None), torch.bfloat16)
    require_rows("table_VD", table_VD)
    require("ids_N", ids_N, (None,), torch.int32)
    vocab, width = table_VD.shape
    num_rows = ids_N.shape[0]
    x_ND = table_VD.new_empty(num_rows, width)
    if num_rows:
        config = config or lookup("embed", _TILE, table_VD.device)
        grid = (num_rows, triton.cdiv(width, config.constants["BLOCK"]))
        strides = (table_VD.stride(0), x_ND.stride(0))
        embed_kernel[grid](x_ND, table_VD, ids_N, vocab, width, *strides, float(scale), **config.launch)
    return x_ND


def rms_norm(
    x_ND: Tensor, weight_D: Tensor, eps: float, out: Tensor | None = None, *, config: Config | None = None
) -> Tensor:
    """`definition.rms_norm` of bf16 rows, which may lie apart, as may those of `out` (default: a new tensor).

    Raises ValueError for rows of more than 8,192 elements or not 16 bytes aligned.
    """
    num_rows, width = _require_norm(x_ND, weight_D)
    out = x_ND.new_empty(num_rows, width) if out is None else out
    require("out", out, (num_rows, width), torch.bfloat16)
    require_rows("out", out)
    if num_rows:
        config = config or _norm_config("rms_norm", x_ND)
        strides = (x_ND.stride(0), out.stride(0))
        rms_norm_kernel[(num_rows,)](out, x_ND, weight_D, width, *strides, float(eps), **config.launch)
    return out


def add_rms_norm(
    x_ND: Tensor,
    delta_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    residual_scale: float,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """(x + residual_scale * delta rounded once, its `definition.rms_norm`); bf16 rows as in `rms_norm`."""
    num_rows, width = _require_norm(x_ND, weight_D)
    require("delta_ND", delta_ND, (num_rows, width), torch.bfloat16)
    require_rows("delta_ND", delta_ND)
    x_new = x_ND.new_empty(num_rows, width)
    normed = x_ND.new_empty(num_rows, width)
    if num_rows:
        config = config or _norm_config("add_rms_norm", x_ND)
        operands = (x_new, normed, x_ND, delta_ND, weight_D, width, x_ND.stride(0), delta_ND.stride(0))
        add_rms_norm_kernel[(num_rows,)](*operands, float(eps), float(residual_scale), **config.launch)
    return x_new, normed


def swiglu(gate_up_N2W: Tensor, *, config: Config | None = None) -> Tensor:
    """`definition.swiglu` of bf16 rows, which may lie further apart than 2 W: [N, W]."""
    require("gate_up_N2W", gate_up_N2W, (None, None), torch.bfloat16)
    require_rows("gate_up_N2W", gate_up_N2W)
    num_rows = gate_up_N2W.shape[0]
    width = gate_up_N2W.shape[1] // 2
    out = gate_up_N2W.new_empty(num_rows, width)
    if num_rows:
        config = config or lookup("swiglu", _TILE, gate_up_N2W.device)
        grid = (num_rows, triton.cdiv(width, config.constants["BLOCK"]))
        swiglu_kernel[grid](out, gate_up_N2W, width, gate_up_N2W.stride(0), **config.launch)
    return out


def _require_norm(x_ND: Tensor, weight_D: Tensor) -> tuple[int, int]:
    require("x_ND", x_ND, (None, None), torch.bfloat16)
    require_rows("x_ND", x_ND)
    require("weight_D", weight_D, (x_ND.shape[1],), torch.bfloat16)
    require_rows("weight_D", weight_D)
    if x_ND.shape[1] > NORM_BLOCKS[-1]:
        raise ValueError(f"x_ND has rows of {x_ND.shape[1]} elements, more than {NORM_BLOCKS[-1]}")
    return x_ND.shape[0], x_ND.shape[1]


def _norm_config(kernel: str, x_ND: Tensor) -> Config:
    block = next(block for block in NORM_BLOCKS if block >= x_ND.shape[1])
    return lookup(kernel, f"block={block}", x_ND.device)


_TYPES = {
    **dict.fromkeys(("x", "x_new", "normed", "delta", "weight", "table", "out", "gate_up"), "*bf16"),
    **dict.fromkeys(("x_stride", "table_stride", "delta_stride", "out_stride", "in_stride", "width", "vocab"), "i32"),
    **{"ids": "*i32", "eps": "fp32", "scale": "fp32"},
}


def _source(kernel: Any, fields: Mapping[str, str]) -> KernelSource:
    signature = {name: _TYPES[name] for name in kernel.arg_names if name in _TYPES}
    aligned = tuple(name for name, type in signature.items() if type in ("*bf16", "i32"))
    return KernelSource(kernel, signature, {"BLOCK": int(fields["block"])}, aligned)


SOURCES: KernelSources = {
    "embed": partial(_source, embed_kernel),
    "rms_norm": partial(_source, rms_norm_kernel),
    "add_rms_norm": partial(_source, add_rms_norm_kernel),
    "swiglu": partial(_source, swiglu_kernel),
}
