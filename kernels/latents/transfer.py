"""Cached rows out of the paged cache into contiguous memory and back, as raw bytes: for transfer between workers.

Bound by memory: a program has ROWS * WORDS * 4 bytes in flight, 8 KiB in every entry of the table.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_contiguous, require_rows
from kernels.table import Config, KernelSource, KernelSources, lookup


@triton.jit
def _tile(slots, num_rows, row_units, UNIT: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Rows [ROWS, 1] and their slots, -1 past the end; columns [1, WORDS]; words of a row.

    They come as `row_units` of UNIT words: so the compiler knows what divides them and moves UNIT words at a time.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * WORDS + tl.arange(0, WORDS)[None, :]
    row_words = row_units * UNIT
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    return row, slot, column, row_words


@triton.jit(do_not_specialize=["num_rows"])
def gather_rows_kernel(
    out, cache, slots, num_rows, row_units, UNIT: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """Program (ROWS rows, WORDS words of each)."""
    row, slot, column, row_words = _tile(slots, num_rows, row_units, UNIT, ROWS, WORDS)
    value = tl.load(cache + slot * row_words + column, mask=(slot >= 0) & (column < row_words), other=0)
    tl.store(out + row * row_words + column, value, mask=(row < num_rows) & (column < row_words))


@triton.jit(do_not_specialize=["num_rows"])
def scatter_rows_kernel(
    cache, rows, slots, num_rows, row_units, UNIT: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    """Program (ROWS rows, WORDS words of each)."""
    row, slot, column, row_words = _tile(slots, num_rows, row_units, UNIT, ROWS, WORDS)
    inside = (slot >= 0) & (column < row_words)
    value = tl.load(rows + row * row_words + column, mask=inside, other=0)
    tl.store(cache + slot * row_words + column, value, mask=inside)


def gather_rows(cache_rows: Tensor, slots_T: Tensor, out: Tensor, *, config: Config | None = None) -> None:
    """out[t] = cache_rows[slots_T[t]], zeros for slot -1.

    `cache_rows` [slots, bytes] and `out` [T, bytes] contiguous uint8, bytes a multiple of 4; `slots_T` int64.
    """
    unit = _require(cache_rows, slots_T, out, "out")
    if slots_T.shape[0]:
        _launch("gather_rows", gather_rows_kernel, (out, cache_rows), slots_T, unit, config)


def scatter_rows(cache_rows: Tensor, slots_T: Tensor, rows: Tensor, *, config: Config | None = None) -> None:
    """cache_rows[slots_T[t]] = rows[t] where the slot is not -1; no slot is named twice. Otherwise as gather_rows."""
    unit = _require(cache_rows, slots_T, rows, "rows")
    if slots_T.shape[0]:
        _launch("scatter_rows", scatter_rows_kernel, (cache_rows, rows), slots_T, unit, config)


def _require(cache_rows: Tensor, slots_T: Tensor, rows: Tensor, name: str) -> int:
    """Words that divide a row: 4 or 1."""
    require("cache_rows", cache_rows, (None, None), torch.uint8)
    require("slots_T", slots_T, (None,), torch.int64)
    require(name, rows, (slots_T.shape[0], cache_rows.shape[1]), torch.uint8)
    if cache_rows.shape[1] % 4:
        raise ValueError(f"cache_rows has rows of {cache_rows.shape[1]} bytes, not a multiple of 4")
    for argument, tensor in (("cache_rows", cache_rows), (name, rows)):
        require_contiguous(argument, tensor)
        require_rows(argument, tensor.view(-1))
    return 1 if cache_rows.shape[1] % 16 else 4


def _launch(
    name: str, kernel: Any, memory: tuple[Tensor, Tensor], slots_T: Tensor, unit: int, config: Config | None
) -> None:
    config = config or lookup(name, f"unit={unit}", slots_T.device)
    words = memory[0].shape[1] // 4
    grid = (triton.cdiv(slots_T.shape[0], config.constants["ROWS"]), triton.cdiv(words, config.constants["WORDS"]))
    operands = (*(rows.view(torch.int32) for rows in memory), slots_T, slots_T.shape[0], words // unit)
    kernel[grid](*operands, UNIT=unit, **config.launch)


def _source(kernel: Any, fields: Mapping[str, str]) -> KernelSource:
    types = {"out": "*i32", "cache": "*i32", "rows": "*i32", "slots": "*i64", "num_rows": "i32", "row_units": "i32"}
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    aligned = tuple(name for name, type in signature.items() if type == "*i32")
    return KernelSource(kernel, signature, {"UNIT": int(fields["unit"])}, aligned)


SOURCES: KernelSources = {
    "gather_rows": partial(_source, gather_rows_kernel),
    "scatter_rows": partial(_source, scatter_rows_kernel),
}
