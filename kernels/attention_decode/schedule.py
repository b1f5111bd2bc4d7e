"""Who computes what in a decode step's attention: splits at fixed positions, and the work list made on the device.

A row's keys are cut into splits whose boundaries are a fixed function of position: short ones first, longer ones later,
so that their number stays bounded. A split's partial (maximum, sum, weighted latents) is computed from zero, and a
row's partials are folded strictly in order of index, ((p0 + p1) + p2) + ... Who computes which cannot change a bit.

An item of work is (row, first split, end split, slot). A row's first item covers its first splits and folds them in
registers; every later split is an item of its own and leaves its partial in a slot. Slots of a row are adjacent, the
first item's comes first. A row of one item needs none: -1, and its output is final. How long first items are is chosen
from all lengths of the step, so that programs finish together, few partials travel, and the slots suffice.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_contiguous
from kernels.table import Config, KernelSource, KernelSources, lookup

MAX_ROWS = 256  # of a step; the schedule is made by one program
PARTIAL_BYTES = 128 << 20  # budget for partials where rows can do without: beyond it first items grow
ITEM_COST = 64  # an item's fixed cost and a partial's way to memory and back, in tokens
PARTIAL_COST = 64


class Splits(NamedTuple):
    """Sizes of splits in tokens: S0 up to E0, S1 up to E1, S2 beyond; powers of two, S0 <= S1 <= S2 <= E0 < E1."""

    S0: int
    S1: int
    S2: int
    E0: int
    E1: int

    def count(self, length: int) -> int:
        """Splits of a row that attends to `length` positions."""
        middle = min(max(length - self.E0, 0), self.E1 - self.E0)
        return -(-min(length, self.E0) // self.S0) - (-middle // self.S1) - (-max(length - self.E1, 0) // self.S2)


class Plan(NamedTuple):
    """What depends on the number of heads alone, and so is the same for every kernel that shares a scratch."""

    splits: Splits
    block_h: int  # heads of one program, padded
    fold: bool  # registers suffice to fold a first item's splits

    def tiles(self, num_heads: int) -> int:
        """Head tiles of a row."""
        return -(-num_heads // self.block_h)


def plan_of(num_heads: int) -> Plan:
    """Few heads are bound by memory: short splits, folded in registers. Many are bound by products: tiles of 64 heads,
    whose accumulator leaves no room for a second one, and longer splits, since each leaves a partial."""
    if num_heads <= 32:
        return Plan(Splits(256, 1024, 4096, 4096, 32768), block_h=16, fold=True)
    return Plan(Splits(512, 1024, 4096, 4096, 32768), block_h=64, fold=False)


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Work list and partials of a decode step; every layer of the step, on one stream, uses the same."""

    plan: Plan
    num_heads: int
    latent_rank: int
    context_length: int
    programs: int  # of the attention kernel
    items: Tensor  # [I, 4] int32: row, first split, end split, slot
    parts: Tensor  # [rows, 2] int32: first slot of a row, its number of partials; 0: padding, 1: nothing to fold
    counters: Tensor  # [2] int32: items, next piece of work
    partials: Tensor  # [slots, head tiles, block_h, C] fp32
    stats: Tensor  # [slots, head tiles, 2, block_h] fp32: maximum in powers of two, sum

    @staticmethod
    def allocate(
        max_rows: int,
        num_heads: int,
        latent_rank: int,
        context_length: int,
        device: torch.device,
        *,
        plan: Plan | None = None,
        programs: int | None = None,
    ) -> "DecodeScratch":
        """Up to 32 heads: at most PARTIAL_BYTES. More: room for every split, that is 17.8 MB a row for 128 heads, 512
        latents and 163,840 positions. Raises ValueError for more than MAX_ROWS rows."""
        if not 0 < max_rows <= MAX_ROWS:
            raise ValueError(f"max_rows is {max_rows}, not 1 to {MAX_ROWS}")
        plan = plan or plan_of(num_heads)
        tiles = plan.tiles(num_heads)
        most = max_rows * plan.splits.count(context_length)
        slots = most
        if plan.fold:
            slots = min(most, PARTIAL_BYTES // (tiles * plan.block_h * (latent_rank + 2) * 4))
        if programs is None:
            cuda = device.type == "cuda"
            programs = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 4
        return DecodeScratch(
            plan,
            num_heads,
            latent_rank,
            context_length,
            programs,
            items=torch.empty(most, 4, dtype=torch.int32, device=device),
            parts=torch.empty(max_rows, 2, dtype=torch.int32, device=device),
            counters=torch.zeros(2, dtype=torch.int32, device=device),
            partials=torch.empty(slots, tiles, plan.block_h, latent_rank, dtype=torch.float32, device=device),
            stats=torch.empty(slots, tiles, 2, plan.block_h, dtype=torch.float32, device=device),
        )

    @property
    def max_rows(self) -> int:
        return self.parts.shape[0]


@triton.jit
def first_of_split(i, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Position at which split i begins."""
    after0 = tl.maximum(i - E0 // S0, 0)
    after1 = tl.maximum(after0 - (E1 - E0) // S1, 0)
    return tl.minimum(i, E0 // S0) * S0 + tl.minimum(after0, (E1 - E0) // S1) * S1 + after1 * S2


@triton.jit
def count_splits(length, S0: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Splits that begin before position `length`."""
    middle = tl.minimum(tl.maximum(length - E0, 0), E1 - E0)
    short = (tl.minimum(length, E0) + S0 - 1) // S0
    return short + (middle + S1 - 1) // S1 + (tl.maximum(length - E1, 0) + S2 - 1) // S2


@triton.jit
def _length(positions_ptr, rows, num_rows, context):
    """A padding row has none. Positions past the context would leave the scratch: they are cut."""
    return tl.minimum(tl.load(positions_ptr + rows, mask=rows < num_rows, other=-1) + 1, context)


@triton.jit
def mla_schedule(  # noqa: PLR0915
    positions_ptr,
    items_ptr,
    parts_ptr,
    counters_ptr,
    num_rows,
    context,
    programs,
    num_slots,
    forced,  # length of first items in tokens; 0: chosen here
    TILES: tl.constexpr,
    FOLD: tl.constexpr,
    S0: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,  # rows compared at a time
    CHOICES: tl.constexpr,
    ITEM_COST: tl.constexpr,
    PARTIAL_COST: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    length = _length(positions_ptr, rows, num_rows, context)
    count = count_splits(length, S0, S1, S2, E0, E1)
    share = tl.sum(length) * TILES // programs  # what each program does if all do the same
    waves = (tl.sum((count > 0).to(tl.int32)) * TILES + programs - 1) // programs
    last_size = tl.where(length <= E0, S0, tl.where(length <= E1, S1, S2))
    chosen = 1 << 30 if FOLD else S0  # whole rows need no slots; without folding every split is an item
    best = tl.cast(2147483647, tl.int32)
    if FOLD:
        for k in tl.static_range(CHOICES):  # the longest first: of equal estimates the one with fewer partials stays
            size = S0 << (CHOICES - 1 - k)
            firsts = tl.minimum(count, count_splits(size + length * 0, S0, S1, S2, E0, E1))
            tokens = tl.minimum(length, first_of_split(firsts, S0, S1, S2, E0, E1))
            later = count - firsts
            partials = tl.sum(tl.where(later > 0, later + 1, 0))
            longest = tl.max(tokens)
            first_done = tl.minimum(waves * longest, tl.sum(tokens) * TILES // programs + longest)
            extra = (tl.sum(later) * ITEM_COST + partials * PARTIAL_COST) * TILES // programs
            all_done = share + extra + tl.max(tl.where(later > 0, last_size, 0))
            estimate = tl.maximum(first_done, all_done)
            better = (partials <= num_slots) & (estimate < best)
            chosen = tl.where(better, size, chosen)
            best = tl.where(better, estimate, best)
        chosen = tl.where(forced > 0, forced, chosen)
    firsts = tl.minimum(count, count_splits(chosen + length * 0, S0, S1, S2, E0, E1))
    later = count - firsts
    tokens = tl.minimum(length, first_of_split(firsts, S0, S1, S2, E0, E1))

    # Rows in descending order of their first items; what stands before a row gives its places in list and slots.
    rank = tl.zeros([ROWS], tl.int32)
    later_before = tl.zeros([ROWS], tl.int32)
    slots_before = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_rows, OTHERS):
        others = start + tl.arange(0, OTHERS)
        length_o = _length(positions_ptr, others, num_rows, context)
        count_o = count_splits(length_o, S0, S1, S2, E0, E1)
        firsts_o = tl.minimum(count_o, count_splits(chosen + length_o * 0, S0, S1, S2, E0, E1))
        later_o = count_o - firsts_o
        tokens_o = tl.minimum(length_o, first_of_split(firsts_o, S0, S1, S2, E0, E1))
        equal_before = (tokens_o[None, :] == tokens[:, None]) & (others[None, :] < rows[:, None])
        before = ((tokens_o[None, :] > tokens[:, None]) | equal_before) & (count_o > 0)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
        later_before += tl.sum(tl.where(before, later_o[None, :], 0), 1)
        slots_before += tl.sum(tl.where(before & (later_o > 0)[None, :], later_o[None, :] + 1, 0), 1)

    num_real = tl.sum((count > 0).to(tl.int32))
    item = items_ptr + rank * 4
    real = count > 0
    tl.store(item, rows, mask=real)
    tl.store(item + 1, tl.zeros_like(rows), mask=real)
    tl.store(item + 2, firsts, mask=real)
    tl.store(item + 3, tl.where(later > 0, slots_before, -1), mask=real)
    tl.store(parts_ptr + rows * 2, slots_before, mask=rows < num_rows)
    tl.store(parts_ptr + rows * 2 + 1, tl.where(real, later + 1, 0), mask=rows < num_rows)
    steps = tl.arange(0, 16)
    for start in range(0, tl.max(later), 16):
        index = (start + steps)[None, :]  # from a row's last split, the longest, backwards
        split = count[:, None] - 1 - index
        place = items_ptr + (num_real + later_before[:, None] + index) * 4
        inside = index < later[:, None]
        tl.store(place, rows[:, None] + index * 0, mask=inside)
        tl.store(place + 1, split, mask=inside)
        tl.store(place + 2, split + 1, mask=inside)
        tl.store(place + 3, slots_before[:, None] + 1 + split - firsts[:, None], mask=inside)
    tl.store(counters_ptr, num_real + tl.sum(later))
    tl.store(counters_ptr + 1, programs)


def schedule_decode(
    positions_B: Tensor, scratch: DecodeScratch, num_heads: int, *, forced: int = 0, config: Config | None = None
) -> None:
    """Makes the work list of a step from its positions (int32, -1: padding), on the device. All layers share it.

    Positions are less than the scratch's context length. `forced` sets the length of first items, a power of two of at
    least S0, for tests; it is for the caller to have the slots then.
    """
    require("positions_B", positions_B, (None,), torch.int32)
    require_contiguous("positions_B", positions_B)
    if num_heads != scratch.num_heads or positions_B.shape[0] > scratch.max_rows:
        rows = positions_B.shape[0]
        raise ValueError(f"{rows} rows, {num_heads} heads; the scratch is for {scratch.max_rows}, {scratch.num_heads}")
    config = config or lookup("mla_schedule", f"heads={num_heads}", positions_B.device)
    mla_schedule[(1,)](
        positions_B,
        scratch.items,
        scratch.parts,
        scratch.counters,
        positions_B.shape[0],
        scratch.context_length,
        scratch.programs,
        scratch.partials.shape[0],
        forced,
        **plan_constants(scratch.plan, num_heads),
        **config.launch,
    )


def plan_constants(plan: Plan, num_heads: int) -> dict[str, Any]:
    """Constants of the schedule that the plan fixes."""
    return {
        "TILES": plan.tiles(num_heads),
        "FOLD": plan.fold,
        "ITEM_COST": ITEM_COST,
        "PARTIAL_COST": PARTIAL_COST,
        **plan.splits._asdict(),
    }


def _source(fields: Mapping[str, str]) -> KernelSource:
    heads = int(fields["heads"])
    pointers = ("positions_ptr", "items_ptr", "parts_ptr", "counters_ptr")
    numbers = ("num_rows", "context", "programs", "num_slots", "forced")
    signature = {**dict.fromkeys(pointers, "*i32"), **dict.fromkeys(numbers, "i32")}
    return KernelSource(mla_schedule, signature, plan_constants(plan_of(heads), heads), pointers)


SOURCES: KernelSources = {"mla_schedule": _source}
