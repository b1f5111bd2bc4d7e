"""Absorbed MLA decode over a paged cache of latents; `definition` says what, `schedule` in which order.

Products stand on their side, scores[keys, heads] = K Q^T and out[C, heads] += V^T P^T: keys and latent columns fill the
64 rows of a tensor core instruction, so 16 heads pad nothing; the tile of K is read from memory once and feeds both
products from shared memory, where Q stays too. Scores are in powers of two, P is rounded to bf16 before its product,
its sum is of the unrounded values. A product that is added to something is one explicit fma: a compiler free to
contract could do so in one kernel and not in another, and bits would depend on the schedule.

bf16 rows are copied to shared memory by the pipeline. 8-bit rows are loaded a tile ahead into registers, made bf16
(exact), and go to shared memory once. Nothing past a row's position is read: 0 * NaN would be NaN.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_decode.cached_rows import block_ids, dequantise, tile_codes, tile_slots
from kernels.attention_decode.combine import combine_partials, fold, scale_heads
from kernels.attention_decode.schedule import DecodeScratch, Plan, first_of_split, plan_of
from kernels.check import require, require_contiguous, require_power_of_two, require_rows
from kernels.lang import dot, to_bf16
from kernels.latents.definition import fp8_row_bytes
from kernels.table import Config, KernelSource, KernelSources, lookup

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_item(item_ptr):
    """(row, first split, end split, slot) of an item of work."""
    row = tl.load(item_ptr).to(tl.int64)
    first = tl.load(item_ptr + 1)
    end = tl.load(item_ptr + 2)
    slot = tl.load(item_ptr + 3)
    return row, first, end, slot


@triton.jit
def _nothing(C: tl.constexpr, BLOCK_H: tl.constexpr):
    """(largest score, sum, weighted latents) before any key."""
    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_H], tl.float32)  # noqa: E741
    acc = tl.zeros([C, BLOCK_H], tl.float32)
    return m, l, acc


@triton.jit
def mla_decode(  # noqa: C901, PLR0915
    q_ptr,
    q_row_stride,
    q_head_stride,
    scale_ptr,
    bytes_ptr,  # the cache three times, by element type
    scales_ptr,
    cache_ptr,
    tables_ptr,
    table_stride,
    positions_ptr,
    items_ptr,
    counters_ptr,
    partials_ptr,
    stats_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    FP8: tl.constexpr,
    ROW: tl.constexpr,  # bytes of a cached row
    BLOCK_SIZE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FOLD: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,  # bf16 latents too are loaded a tile ahead, in registers
):
    heads = tl.arange(0, BLOCK_H)
    columns = tl.arange(0, C)[:, None]
    latent = tl.arange(0, C)[None, :]
    rotary = tl.arange(0, R)
    keys = tl.arange(0, BLOCK_N)
    work = tl.program_id(0)
    num_work = tl.load(counters_ptr) * TILES
    while work < num_work:
        row, first, end, slot = _load_item(items_ptr + (work // TILES) * 4)
        head = (work % TILES) * BLOCK_H + heads
        is_head = (head < HEADS)[None, :]
        length = tl.load(positions_ptr + row) + 1
        scale = tl.load(scale_ptr + row) * _LOG2E
        q_rows = q_ptr + row * q_row_stride + head[None, :].to(tl.int64) * q_head_stride
        q = tl.load(q_rows + columns, mask=is_head, other=0.0)
        q_pe = tl.load(q_rows + C + rotary[:, None], mask=is_head, other=0.0)
        m, l, acc = _nothing(C, BLOCK_H)  # noqa: E741
        if FOLD:
            m_row, l_row, acc_row = _nothing(C, BLOCK_H)
        begin = first_of_split(first, S0, S1, S2, E0, E1)
        stop = tl.minimum(first_of_split(end, S0, S1, S2, E0, E1), length)
        table = tables_ptr + row * table_stride
        pe_ptr = cache_ptr + (ROW // 2 - R) + rotary[None, :]
        ids = block_ids(table, begin, keys, length, BLOCK_SIZE, BLOCK_N)
        slots = tile_slots(ids, begin, keys, BLOCK_SIZE, BLOCK_N)
        visible = (begin + keys < length)[:, None]
        if FOLD:
            k_pe = tl.load(pe_ptr + slots * (ROW // 2), mask=visible, other=0.0)
        if FP8:
            codes, scales = tile_codes(bytes_ptr, scales_ptr, slots, visible, ROW, C)
            c = dequantise(codes, scales)
        elif AHEAD:
            c = tl.load(cache_ptr + slots * (ROW // 2) + latent, mask=visible, other=0.0)
        for n in range(begin, stop, BLOCK_N):
            visible = (n + keys < length)[:, None]
            slots = tile_slots(ids, n, keys, BLOCK_SIZE, BLOCK_N)
            if not FP8 and not AHEAD:
                c = tl.load(cache_ptr + slots * (ROW // 2) + latent, mask=visible, other=0.0)
            # What the next tile needs is on its way while this one is computed. Not read past `stop`: others' splits.
            after = n + BLOCK_N
            ids = block_ids(table, after, keys, stop, BLOCK_SIZE, BLOCK_N)
            slots_after = tile_slots(ids, after, keys, BLOCK_SIZE, BLOCK_N)
            visible_after = (after + keys < stop)[:, None]
            if FOLD:
                k_pe_after = tl.load(pe_ptr + slots_after * (ROW // 2), mask=visible_after, other=0.0)
            else:
                k_pe = tl.load(pe_ptr + slots * (ROW // 2), mask=visible, other=0.0)
            if FP8:
                codes, scales = tile_codes(bytes_ptr, scales_ptr, slots_after, visible_after, ROW, C)
            elif AHEAD:
                c_after = tl.load(cache_ptr + slots_after * (ROW // 2) + latent, mask=visible_after, other=0.0)
            # Both products apart and no sum of them: Triton would chain them, and give every warp all heads.
            s = dot(c, q, tl.zeros([BLOCK_N, BLOCK_H], tl.float32))
            s_pe = dot(k_pe, q_pe, tl.zeros([BLOCK_N, BLOCK_H], tl.float32))
            s = tl.fma(s, tl.broadcast_to(scale, s.shape), s_pe * scale)
            if after > length:  # a branch, which also ends what Triton sees as one chain of products
                s = tl.where(visible, s, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 0))
            p = tl.exp2(s - m_new[None, :])
            rescale = tl.exp2(m - m_new)
            m, l = m_new, tl.fma(l, rescale, tl.sum(p, 0))  # noqa: E741
            acc = scale_heads(acc, rescale, tl.zeros_like(acc), 0)
            acc = dot(c.T, to_bf16(p), acc)
            if FP8:
                c = dequantise(codes, scales)
            elif AHEAD:
                c = c_after
            if FOLD:
                k_pe = k_pe_after
                size = tl.where(n < E0, S0, tl.where(n < E1, S1, S2))
                if (after % size == 0) | (after >= stop):  # a split ends; m = -inf begins the next from zero
                    m_row, l_row, acc_row = fold(m_row, l_row, acc_row, m, l, acc, 0)
                    m = tl.full([BLOCK_H], -float("inf"), tl.float32)
        if FOLD:
            m = m_row
            l = l_row  # noqa: E741
            acc = acc_row
        if slot < 0:
            out = acc * tl.div_rn(1.0 + tl.zeros_like(l), l)[None, :]
            tl.store(out_ptr + (row * HEADS + head[None, :]) * C + columns, to_bf16(out), mask=is_head)
        else:
            at = slot.to(tl.int64) * TILES + work % TILES
            tl.store(partials_ptr + (at * BLOCK_H + heads[None, :]) * C + columns, acc)
            stats = stats_ptr + at * (2 * BLOCK_H) + heads
            tl.store(stats, m)
            tl.store(stats + BLOCK_H, l)
        work = tl.atomic_add(counters_ptr + 1, 1)


def paged_mla_decode(
    q_BHL: Tensor,
    scale_B: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    positions_B: Tensor,
    scratch: DecodeScratch,
    *,
    latent_rank: int,
    config: Config | None = None,
    combine_config: Config | None = None,
) -> Tensor:
    """Attention of each row to positions 0 to its own of the latents as stored, bf16 [B, H, C]; padding rows are zero.

    `q_BHL` is absorbed and unscaled bf16, `scale_B` fp32 and positive. `cache` is [blocks, block_size, C + R] bf16 or
    [blocks, block_size, bytes] uint8, as `kernels.latents.definition` says. `schedule_decode` was given the same
    positions and scratch. Raises ValueError for what does not fit, UnsupportedKernel for what the table does not have.
    """
    B, H, L = q_BHL.shape
    R = L - latent_rank
    block_size = cache.shape[1]
    _check(q_BHL, scale_B, cache, block_tables, positions_B, latent_rank)
    if scratch.num_heads != H or scratch.latent_rank != latent_rank or scratch.max_rows < B:
        made_for = (scratch.max_rows, scratch.num_heads, scratch.latent_rank)
        raise ValueError(f"{(B, H, latent_rank)} rows, heads, latent rank: the scratch is for {made_for}")
    fp8 = cache.dtype == torch.uint8
    rows = f"rows={'fp8' if fp8 else 'bf16'},block_size={block_size}"
    variant = f"heads={H},latent={latent_rank},rope={R}"
    config = config or lookup("mla_decode", f"{variant},{rows}", q_BHL.device)
    out_BHC = torch.empty(B, H, latent_rank, dtype=torch.bfloat16, device=q_BHL.device)
    views = (cache, cache.view(torch.float32), cache.view(torch.bfloat16)) if fp8 else (cache, scale_B, cache)
    mla_decode[(scratch.programs,)](
        q_BHL,
        q_BHL.stride(0),
        q_BHL.stride(1),
        scale_B,
        *views,
        block_tables,
        block_tables.stride(0),
        positions_B,
        scratch.items,
        scratch.counters,
        scratch.partials,
        scratch.stats,
        out_BHC,
        **_constants(scratch.plan, H, latent_rank, R, fp8=fp8),
        BLOCK_SIZE=block_size,
        **config.launch,
    )
    combine_partials(scratch, out_BHC, config=combine_config)
    return out_BHC


def _check(q_BHL: Tensor, scale_B: Tensor, cache: Tensor, block_tables: Tensor, positions_B: Tensor, rank: int) -> None:
    B = q_BHL.shape[0]
    rope = q_BHL.shape[2] - rank
    require("q_BHL", q_BHL, (None, None, None), torch.bfloat16)
    require_rows("q_BHL", q_BHL)
    require_power_of_two("latent_rank", rank)
    require_power_of_two("rope", rope)
    require("scale_B", scale_B, (B,), torch.float32)
    require("positions_B", positions_B, (B,), torch.int32)
    require("block_tables", block_tables, (B, None), torch.int32)
    width = fp8_row_bytes(rank, rope) if cache.dtype == torch.uint8 else rank + rope
    require("cache", cache, (None, None, width), torch.bfloat16, torch.uint8)
    require_power_of_two("block_size", cache.shape[1])
    for name, tensor in {
        "cache": cache,
        "scale_B": scale_B,
        "positions_B": positions_B,
        "tables": block_tables,
    }.items():
        require_contiguous(name, tensor)


def _constants(plan: Plan, heads: int, rank: int, rope: int, *, fp8: bool) -> dict[str, Any]:
    row = fp8_row_bytes(rank, rope) if fp8 else 2 * (rank + rope)
    tiles = {"HEADS": heads, "TILES": plan.tiles(heads), "BLOCK_H": plan.block_h, "FOLD": plan.fold}
    return {**tiles, "C": rank, "R": rope, "FP8": fp8, "ROW": row, **plan.splits._asdict()}


def _source(fields: Mapping[str, str]) -> KernelSource:
    heads = int(fields["heads"])
    fp8 = fields["rows"] == "fp8"
    rank = int(fields["latent"])
    rope = int(fields["rope"])
    types = {
        "*bf16": "q_ptr cache_ptr out_ptr",
        "*fp32": "scale_ptr scales_ptr partials_ptr stats_ptr",
        "*i32": "tables_ptr positions_ptr items_ptr counters_ptr",
        "i32": "q_row_stride q_head_stride table_stride",
    }
    signature = {name: kind for kind, names in types.items() for name in names.split()}
    signature["bytes_ptr"] = "*u8" if fp8 else "*bf16"
    aligned = tuple(name for name in signature if name != "table_stride")
    constants = {**_constants(plan_of(heads), heads, rank, rope, fp8=fp8), "BLOCK_SIZE": int(fields["block_size"])}
    return KernelSource(mla_decode, signature, constants, aligned)


SOURCES: KernelSources = {"mla_decode": _source}
