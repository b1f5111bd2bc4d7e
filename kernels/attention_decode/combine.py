"""A row's partials, folded in order of index: the second kernel of decode attention, after `mla_decode`."""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_decode.schedule import DecodeScratch, Plan, plan_of
from kernels.lang import to_bf16
from kernels.table import Config, KernelSource, KernelSources, lookup


@triton.jit
def fold(m_a, l_a, acc_a, m_b, l_b, acc_b, AXIS: tl.constexpr):
    """The one way two partials of a row become one, here and in the other kernel; heads lie across AXIS."""
    m = tl.maximum(m_a, m_b)
    a = tl.exp2(m_a - m)
    b = tl.exp2(m_b - m)
    scaled_b = scale_heads(acc_b, b, tl.zeros_like(acc_b), AXIS)  # + 0: no negative zero
    return m, tl.fma(l_a, a, l_b * b), scale_heads(acc_a, a, scaled_b, AXIS)


@triton.jit
def scale_heads(acc, factor_H, addend, AXIS: tl.constexpr):
    return tl.fma(acc, tl.broadcast_to(tl.expand_dims(factor_H, AXIS), acc.shape), addend)


@triton.jit
def mla_combine(
    parts_ptr,
    counters_ptr,
    partials_ptr,
    stats_ptr,
    out_ptr,
    programs,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IN_FLIGHT: tl.constexpr,  # partials on their way
):
    """One head of one row: folds its partials. A row that is finished is left alone, a padding row becomes zero."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    if (row == 0) & (head == 0):
        tl.store(counters_ptr + 1, programs)  # the next layer's work begins anew
    slot = tl.load(parts_ptr + row * 2).to(tl.int64)
    count = tl.load(parts_ptr + row * 2 + 1)
    columns = tl.arange(0, C)[None, :]
    out = out_ptr + (row.to(tl.int64) * HEADS + head) * C + columns
    if count == 0:
        tl.store(out, to_bf16(tl.zeros([1, C], tl.float32)))
    elif count > 1:
        m = tl.full([1], -float("inf"), tl.float32)
        l = tl.zeros([1], tl.float32)  # noqa: E741
        acc = tl.zeros([1, C], tl.float32)
        for i in tl.range(0, count, num_stages=IN_FLIGHT):  # loads run ahead of the folds
            at = (slot + i) * TILES + head // BLOCK_H
            stats = stats_ptr + at * (2 * BLOCK_H) + head % BLOCK_H + tl.arange(0, 1)
            m_i = tl.load(stats)
            l_i = tl.load(stats + BLOCK_H)
            acc_i = tl.load(partials_ptr + (at * BLOCK_H + head % BLOCK_H) * C + columns)
            m, l, acc = fold(m, l, acc, m_i, l_i, acc_i, 1)  # noqa: E741
        tl.store(out, to_bf16(acc * tl.div_rn(1.0 + tl.zeros_like(l), l)[:, None]))


def combine_partials(scratch: DecodeScratch, out_BHC: Tensor, *, config: Config | None = None) -> None:
    """Writes the unfinished rows of bf16 [B, H, C] from the partials that `mla_decode` left in the scratch."""
    B, H, C = out_BHC.shape
    config = config or lookup("mla_combine", f"heads={H},latent={C}", out_BHC.device)
    mla_combine[(B, H)](
        scratch.parts,
        scratch.counters,
        scratch.partials,
        scratch.stats,
        out_BHC,
        scratch.programs,
        **_constants(scratch.plan, H, C),
        **config.launch,
    )


def _constants(plan: Plan, heads: int, rank: int) -> dict[str, Any]:
    return {"HEADS": heads, "C": rank, "TILES": plan.tiles(heads), "BLOCK_H": plan.block_h}


def _source(fields: Mapping[str, str]) -> KernelSource:
    heads = int(fields["heads"])
    rank = int(fields["latent"])
    pointers = {"parts_ptr": "*i32", "counters_ptr": "*i32", "partials_ptr": "*fp32", "stats_ptr": "*fp32"}
    pointers["out_ptr"] = "*bf16"
    constants = _constants(plan_of(heads), heads, rank)
    return KernelSource(mla_combine, {**pointers, "programs": "i32"}, constants, tuple(pointers))


SOURCES: KernelSources = {"mla_combine": _source}
