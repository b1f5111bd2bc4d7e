"""Grouping of (row, choice) pairs by expert, on the device: tiles of slots, each tile of one expert.

Pair p is choice p % A of row p // A. The pairs of an expert follow each other in order, from the first slot of a tile
on; slots of its last tile that are left over hold -1. How many tiles there are is known only on the device: at most
`max_tiles`, which fixes the grids of the kernels that work through them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.table import KernelSource, KernelSources, lookup

Role = Literal["decode", "prefill"]
MAX_TILE = 128
_PAIRS = 1024  # pairs of a block
_SIZES = (64, 256, 512)  # counts a program holds, each with its own entry in the table


@triton.jit
def _load_block(ids, block, num_pairs, num_real_rows, choices, PAIRS: tl.constexpr):
    """(pair, expert, whether the pair is of a real row) of a block of pairs; the expert is 0 where it is not."""
    if num_real_rows is not None:
        num_pairs = tl.minimum(num_pairs, tl.load(num_real_rows) * choices)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    real = pair < num_pairs
    return pair, tl.load(ids + pair, mask=real, other=0), real


@triton.jit
def _count_block(ids, block, num_pairs, num_real_rows, choices, expert, EXPERTS: tl.constexpr, PAIRS: tl.constexpr):
    """Pairs of each expert in a block."""
    _, id, real = _load_block(ids, block, num_pairs, num_real_rows, choices, PAIRS)
    unreal = PAIRS - tl.sum(real.to(tl.int32), axis=0)
    return tl.histogram(id, EXPERTS) - tl.where(expert == 0, unreal, 0)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(counts, ids, num_real_rows, num_pairs, choices, EXPERTS: tl.constexpr, PAIRS: tl.constexpr):
    """Program (block): counts[block, expert]."""
    block = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    counted = _count_block(ids, block, num_pairs, num_real_rows, choices, expert, EXPERTS, PAIRS)
    tl.store(counts + block * EXPERTS + expert, counted)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def place_kernel(
    slots, tile_experts, num_tiles, ids, counts, num_real_rows, num_pairs, choices, num_blocks, tile_slots,
    EXPERTS: tl.constexpr, PAIRS: tl.constexpr, TILE: tl.constexpr,  # TILE: at least tile_slots
):  # fmt: skip
    """Program (block, expert) puts that block's pairs of that expert into their slots.

    Every program looks at all blocks' counts for where its pairs begin; without `counts` it makes them itself.
    """
    block = tl.program_id(0)
    mine = tl.program_id(1)
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for b in range(0, num_blocks):
        if counts is None:
            counted = _count_block(ids, b, num_pairs, num_real_rows, choices, expert, EXPERTS, PAIRS)
        else:
            counted = tl.load(counts + b * EXPERTS + expert)
        total += counted
        before += tl.where(b < block, counted, 0)
    tiles = (total + tile_slots - 1) // tile_slots
    last_tile = tl.sum(tl.where(expert <= mine, tiles, 0), axis=0)
    first_tile = last_tile - tl.sum(tl.where(expert == mine, tiles, 0), axis=0)
    first_slot = first_tile * tile_slots
    pair, id, real = _load_block(ids, block, num_pairs, num_real_rows, choices, PAIRS)
    chosen = real & (id == mine)
    slot = first_slot + tl.sum(tl.where(expert == mine, before, 0), axis=0) + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(slots + slot, pair, mask=chosen)
    if block == 0:
        left = first_slot + tl.sum(tl.where(expert == mine, total, 0), axis=0) + tl.arange(0, TILE)
        tl.store(slots + left, -1, mask=left < last_tile * tile_slots)
        for tile in range(first_tile, last_tile):
            tl.store(tile_experts + tile, mine)
        if mine == 0:
            tl.store(num_tiles, tl.sum(tiles, axis=0))


class Groups(NamedTuple):
    """Slots past the tiles that exist hold nothing defined."""

    slots_S: Tensor  # int32 [max_tiles * tile_slots] pair of each slot, or -1
    tile_experts_T: Tensor  # int32 [max_tiles] expert of each tile
    num_tiles_1: Tensor  # int32 [1]


def group_pairs(
    ids_NA: Tensor, num_real_rows: Tensor | None, num_experts: int, tile_slots: int, *, role: Role
) -> Groups:
    """Tiles of the pairs of the first `num_real_rows` rows (device int32; None: all); no id of another row is used.

    Ids of real rows must be below `num_experts`. Raises UnsupportedKernel over 512 experts.
    """
    num_pairs = ids_NA.numel()
    choices = ids_NA.shape[1]
    max_tiles = min(num_pairs, num_pairs // tile_slots + num_experts)
    sizes = (max_tiles * tile_slots, max_tiles, 1)
    groups = Groups(*(ids_NA.new_empty(size, dtype=torch.int32) for size in sizes))
    num_blocks = triton.cdiv(num_pairs, _PAIRS)
    experts = next((size for size in _SIZES if num_experts <= size), num_experts)
    counts = None
    if role == "prefill":
        config = lookup("moe_count", f"experts={experts}", ids_NA.device)
        counts = ids_NA.new_empty(num_blocks, experts, dtype=torch.int32)
        count_kernel[(num_blocks,)](counts, ids_NA, num_real_rows, num_pairs, choices, experts, _PAIRS, **config.launch)
    config = lookup("moe_place", f"experts={experts},role={role}", ids_NA.device)
    operands = (*groups, ids_NA, counts, num_real_rows, num_pairs, choices, num_blocks, tile_slots)
    place_kernel[(num_blocks, num_experts)](*operands, experts, _PAIRS, MAX_TILE, **config.launch)
    return groups


def _count_source(fields: Mapping[str, str]) -> KernelSource:
    pointers = {"counts": "*i32", "ids": "*i32", "num_real_rows": "*i32"}
    constants = {"EXPERTS": int(fields["experts"]), "PAIRS": _PAIRS}
    return KernelSource(count_kernel, {**pointers, "num_pairs": "i32", "choices": "i32"}, constants, tuple(pointers))


def _place_source(fields: Mapping[str, str]) -> KernelSource:
    pointers = dict.fromkeys(("slots", "tile_experts", "num_tiles", "ids", "counts", "num_real_rows"), "*i32")
    numbers = dict.fromkeys(("num_pairs", "choices", "num_blocks", "tile_slots"), "i32")
    constants = {"EXPERTS": int(fields["experts"]), "PAIRS": _PAIRS, "TILE": MAX_TILE}
    if fields["role"] == "decode":
        del pointers["counts"]
        constants["counts"] = None
    return KernelSource(place_kernel, {**pointers, **numbers}, constants, tuple(pointers))


SOURCES: KernelSources = {"moe_count": _count_source, "moe_place": _place_source}
