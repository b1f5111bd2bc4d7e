"""Row-exact products in bf16: linear layers, products per head, router logits.

A row's result is one chain of tensor core products over K, the same whatever else the step holds: the tile of rows is
fixed by the table for a role, the tile of columns is chosen by the weight's shape alone, and K is never split over
programs. Rows past the last are masked: a decode step of one row loads one row.

Shapes: N rows, K inputs, M outputs, H heads, E experts. K and M are multiples of 16.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_rows
from kernels.lang import dot, round_to, to_bf16
from kernels.table import Config, KernelSource, KernelSources, lookup

Role = Literal["decode", "prefill"]
ALIGNMENT = 16  # elements: sizes and strides are multiples of it, so that every load is one of 16 bytes
# Columns up to which a matrix is narrow, or medium: its tiles keep 132 multiprocessors busy.
_NARROW = 4096
_MEDIUM = 8448


@triton.jit
def place(num_rows, num_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: GROUP row tiles pass over the columns together, rows innermost.

    A tile of weights is thus read by programs that run at the same time, all but the first of them from L2.
    """
    row_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    column_tiles = tl.cdiv(num_columns, BLOCK_COLUMNS)
    first = tl.program_id(0) // (GROUP * column_tiles) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    in_group = tl.program_id(0) % (GROUP * column_tiles)
    return first + in_group % size, in_group // size


# N is not specialised on: a step of one row must run the very code that a step of many runs.
@triton.jit(do_not_specialize=["N"])
def _product(
    x,
    weight,
    bias,
    out,
    N,
    K,
    M,
    num_biased,
    x_row,
    x_head,
    weight_line,
    weight_head,
    out_row,
    out_head,
    K_INNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[n, h, m] = sum over k of x[n, h, k] * weight[h, k, m], + bias[m] for m < num_biased.

    Programs: (tiles, heads). `weight_line` is the stride of m if K_INNER, else that of k; the other one is contiguous.
    """
    row_tile, column_tile = place(N, M, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    head = tl.program_id(1).to(tl.int64)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_K)
    row_exists = (rows < N)[:, None]
    column_exists = (columns < M)[None, :]

    x_tile = x + head * x_head + rows.to(tl.int64)[:, None] * x_row + k[None, :]
    weight_tile = weight + head * weight_head
    if K_INNER:
        weight_tile += columns.to(tl.int64)[None, :] * weight_line + k[:, None]
    else:
        weight_tile += k.to(tl.int64)[:, None] * weight_line + columns[None, :]
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, K, BLOCK_K):
        x_k = tl.load(x_tile, mask=row_exists & (k < K - first)[None, :], other=0.0)
        weight_k = tl.load(weight_tile, mask=(k < K - first)[:, None] & column_exists, other=0.0)
        acc = dot(x_k, weight_k, acc)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K if K_INNER else BLOCK_K * weight_line.to(tl.int64)

    acc += tl.load(bias + columns, mask=columns < num_biased, other=0.0).to(tl.float32)[None, :]
    out_tile = out + head * out_head + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(out_tile, round_to(acc, out.dtype.element_ty), mask=row_exists & column_exists)


@triton.jit(do_not_specialize=["N"])
def _router(
    x,
    weight,
    out,
    N,
    K,
    E,
    x_row,
    weight_row,
    out_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[n, e] = sum over k of x[n, k] * weight[e, k] in fp32.

    An fp32 weight is the sum of three bf16 parts: tensor cores multiply each exactly, in chains of their own.
    """
    row_tile, column_tile = place(N, E, BLOCK_ROWS, BLOCK_COLUMNS, GROUP)
    rows = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_K)
    row_exists = (rows < N)[:, None]
    column_exists = (columns < E)[None, :]

    x_tile = x + rows.to(tl.int64)[:, None] * x_row + k[None, :]
    weight_tile = weight + columns.to(tl.int64)[None, :] * weight_row + k[:, None]
    high = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    middle = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    low = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, K, BLOCK_K):
        x_k = tl.load(x_tile, mask=row_exists & (k < K - first)[None, :], other=0.0)
        weight_k = tl.load(weight_tile, mask=(k < K - first)[:, None] & column_exists, other=0.0)
        if weight.dtype.element_ty == tl.float32:
            high_k = to_bf16(weight_k)
            rest = weight_k - high_k.to(tl.float32)
            middle_k = to_bf16(rest)
            middle = dot(x_k, middle_k, middle)
            low = dot(x_k, to_bf16(rest - middle_k.to(tl.float32)), low)
            high = dot(x_k, high_k, high)
        else:
            high = dot(x_k, weight_k, high)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K

    out_tile = out + rows.to(tl.int64)[:, None] * out_row + columns[None, :]
    tl.store(out_tile, low + middle + high, mask=row_exists & column_exists)


class _Weight(NamedTuple):
    """One matrix per head, as the kernel walks it."""

    tensor: Tensor
    K: int
    M: int
    line: int
    head: int
    k_inner: bool


def linear(
    x_NK: Tensor,
    weight_MK: Tensor,
    bias_M: Tensor | None = None,
    *,
    role: Role,
    out_dtype: torch.dtype = torch.bfloat16,
    config: Config | None = None,
) -> Tensor:
    """x @ weight^T + bias, [N, M] in `out_dtype` (bf16 or fp32), accumulated in fp32 and rounded once.

    All inputs are bf16; rows of `x_NK` and `weight_MK` may lie apart. Raises ValueError for what does not fit by name
    and UnsupportedKernel where the table has no entry.
    """
    require("weight_MK", weight_MK, (None, None), torch.bfloat16)
    M, K = weight_MK.shape
    require("x_NK", x_NK, (None, K), torch.bfloat16)
    out_NM = torch.empty(x_NK.shape[0], M, dtype=out_dtype, device=x_NK.device)
    require_aligned(x_NK=x_NK, weight_MK=weight_MK, out_NM=out_NM)
    if bias_M is not None:
        require("bias_M", bias_M, (M,), torch.bfloat16)
        require_rows("bias_M", bias_M)
    variant = f"role={role},width={width(role, M)},out={dtype_name(out_dtype)}"
    config = config or lookup("linear", variant, x_NK.device)
    weight = _Weight(weight_MK, K, M, weight_MK.stride(0), 0, k_inner=True)
    _launch(x_NK.unsqueeze(1), weight, bias_M, out_NM.unsqueeze(1), config)
    return out_NM


def head_matmul(
    x_NHK: Tensor, weight_HKM: Tensor, out_NHM: Tensor, *, role: Role, config: Config | None = None
) -> None:
    """out[n, h] = x[n, h] @ weight[h], all bf16; rows of x and out may lie apart, K or M of the weight is contiguous.

    Raises as `linear` does.
    """
    require("weight_HKM", weight_HKM, (None, None, None), torch.bfloat16)
    H, K, M = weight_HKM.shape
    require("x_NHK", x_NHK, (None, H, K), torch.bfloat16)
    require("out_NHM", out_NHM, (x_NHK.shape[0], H, M), torch.bfloat16)
    if 1 not in weight_HKM.stride()[1:]:
        raise ValueError(f"weight_HKM has strides {weight_HKM.stride()}: neither K nor M is contiguous")
    k_inner = weight_HKM.stride(1) == 1
    lines = weight_HKM.transpose(1, 2) if k_inner else weight_HKM
    require_aligned(x_NHK=x_NHK, weight_HKM=lines, out_NHM=out_NHM)
    config = config or lookup("head_matmul", f"role={role},inner={'k' if k_inner else 'm'}", x_NHK.device)
    _launch(x_NHK, _Weight(weight_HKM, K, M, lines.stride(1), lines.stride(0), k_inner), None, out_NHM, config)


def router_logits(x_NK: Tensor, weight_EK: Tensor, role: Role, *, config: Config | None = None) -> Tensor:
    """x @ weight^T in fp32, [N, E]: products are exact, sums fp32. `weight_EK` is fp32 or bf16. Raises as `linear`."""
    require("weight_EK", weight_EK, (None, None), torch.float32, torch.bfloat16)
    E, K = weight_EK.shape
    require("x_NK", x_NK, (None, K), torch.bfloat16)
    N = x_NK.shape[0]
    out_NE = torch.empty(N, E, dtype=torch.float32, device=x_NK.device)
    require_aligned(x_NK=x_NK, weight_EK=weight_EK, out_NE=out_NE)
    config = config or lookup("router_logits", f"role={role},weight={dtype_name(weight_EK.dtype)}", x_NK.device)
    strides = x_NK.stride(0), weight_EK.stride(0), out_NE.stride(0)
    _router[(tiles(config, N, E),)](x_NK, weight_EK, out_NE, N, K, E, *strides, **config.launch)
    return out_NE


def tiles(config: Config, num_rows: int, num_columns: int) -> int:
    """Programs of a launch; see `place`."""
    rows = config.constants["BLOCK_ROWS"]
    columns = config.constants["BLOCK_COLUMNS"]
    return -(-num_rows // rows) * -(-num_columns // columns)


def width(role: Role, num_columns: int) -> str:
    """Which tile of columns a matrix takes: wide ones for bandwidth, narrow ones where they make too few programs."""
    if num_columns <= _NARROW:
        return "narrow"
    return "medium" if role == "decode" and num_columns <= _MEDIUM else "wide"


def dtype_name(dtype: torch.dtype) -> str:
    """As table variants and signatures say it. Raises ValueError for anything but bf16 and fp32."""
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{dtype} is neither bfloat16 nor float32")
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def require_aligned(**tensors: Tensor) -> None:
    """Raises ValueError unless rows are contiguous, 16 bytes aligned, and sizes and strides multiples of ALIGNMENT."""
    for name, tensor in tensors.items():
        require_rows(name, tensor)
        if tensor.shape[-1] % ALIGNMENT:
            raise ValueError(f"{name} has rows of {tensor.shape[-1]} elements, no multiple of {ALIGNMENT}")
        if any(stride % ALIGNMENT for stride in tensor.stride()[:-1]):
            raise ValueError(f"{name} has strides {tensor.stride()}: rows must lie multiples of {ALIGNMENT} apart")


def _launch(x_NHK: Tensor, weight: _Weight, bias_M: Tensor | None, out_NHM: Tensor, config: Config) -> None:
    N, H, _ = x_NHK.shape
    bias, num_biased = (x_NHK, 0) if bias_M is None else (bias_M, weight.M)  # without one, any address will do
    _product[(tiles(config, N, weight.M), H)](
        *(x_NHK, weight.tensor, bias, out_NHM, N, weight.K, weight.M, num_biased),
        *(x_NHK.stride(0), x_NHK.stride(1), weight.line, weight.head, out_NHM.stride(0), out_NHM.stride(1)),
        K_INNER=weight.k_inner,
        **config.launch,
    )


def _product_source(out: str, *, k_inner: bool) -> KernelSource:
    sizes = "K M num_biased x_row x_head weight_line weight_head out_row out_head".split()
    pointers = {"x": "*bf16", "weight": "*bf16", "bias": "*bf16", "out": f"*{out}"}
    signature = {**pointers, "N": "i32", **dict.fromkeys(sizes, "i32")}
    return KernelSource(_product, signature, {"K_INNER": k_inner}, (*pointers, *sizes))


def _router_source(fields: Mapping[str, str]) -> KernelSource:
    sizes = "K E x_row weight_row out_row".split()
    pointers = {"x": "*bf16", "weight": f"*{fields['weight']}", "out": "*fp32"}
    return KernelSource(_router, {**pointers, "N": "i32", **dict.fromkeys(sizes, "i32")}, {}, (*pointers, *sizes))


SOURCES: KernelSources = {
    "linear": lambda fields: _product_source(fields["out"], k_inner=True),
    "head_matmul": lambda fields: _product_source("bf16", k_inner=fields["inner"] == "k"),
    "router_logits": _router_source,
}
