"""Paged MLA decode over a grid of shapes: against the ceilings, the peers, fp8 rows and our own inexact variant."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_timing import Call, Ceilings, Report, Sample, Timer
from benchmarks.inexact import plan_for
from benchmarks.kernels.cells import BLOCK, LATENT, Cache, Cell, Error, Inputs, error_of, make_inputs
from benchmarks.kernels.peers import Peers
from kernels.attention_decode.attend import paged_mla_decode
from kernels.attention_decode.schedule import DecodeScratch, Plan, plan_of, schedule_decode

HEADS = (16, 128)
BATCHES = (1, 8, 32, 128, 256)
CONTEXTS = tuple(n << 10 for n in (1, 4, 16, 64, 128))
FP8_MOST_BLOCKS = 32 * (128 << 10) // BLOCK
MEMORY_SHARE = 0.6  # of what is free, for the cache
MOST_COSINE = 1e-4  # error of a result: rounding to bf16 gives 2e-6
LARGE_BYTES = 150_000_000  # the goal for 16 heads is about cells that read so many


def grid() -> list[Cell]:
    """All heads, batches and contexts; then varied lengths, several queries, fp8 rows where cells are large."""
    cells = [Cell(*shape) for shape in itertools.product(HEADS, BATCHES, CONTEXTS)]
    cells += [Cell(heads, 128, context, is_varied=True) for heads in HEADS for context in (4 << 10, 16 << 10)]
    cells += [Cell(heads, 32, 16 << 10, q_len=q_len) for heads in HEADS for q_len in (2, 4)]
    large = [Cell(heads, *shape) for heads in HEADS for shape in ((128, 4 << 10), (32, 16 << 10), (32, 64 << 10))]
    return cells + [replace(cell, rows="fp8") for cell in large]


def quick_grid() -> list[Cell]:
    corners = [(1, 64 << 10), (32, 16 << 10), (128, 4 << 10)]
    cells = [Cell(heads, *corner) for heads in HEADS for corner in corners]
    return [*cells, Cell(16, 128, 4 << 10, is_varied=True), Cell(16, 32, 16 << 10, rows="fp8")]


def dry_grid() -> list[Cell]:
    return [Cell(16, 1, 70), Cell(16, 2, 40, q_len=2, is_varied=True), Cell(16, 1, 70, rows="fp8")]


class Outcome(NamedTuple):
    cell: Cell
    times: dict[str, Sample]  # seconds by contender
    error: Error

    def seconds(self, name: str) -> float:
        return self.times[name].median if name in self.times else math.nan

    @property
    def best_peer(self) -> tuple[str, float]:
        """Of the kernels alone; SDPA sees other memory, so it is the best only where it is the only one."""
        peers = {name: sample.median for name, sample in self.times.items() if not name.startswith("ours")}
        paged = {name: seconds for name, seconds in peers.items() if "SDPA" not in name and "whole" not in name}
        return min((paged or peers).items(), key=lambda item: item[1], default=("", math.nan))


def our_calls(cell: Cell, inputs: Inputs, plan: Plan | None = None) -> dict[str, Call]:
    """Whole: schedule, attention and combination, as a step with one layer; kernels: without the schedule."""
    N = inputs.positions_N.shape[0]
    device = inputs.cache.device
    scratch = DecodeScratch.allocate(N, cell.heads, LATENT, cell.longest, device, plan=plan)

    def attend(rotation: int) -> Tensor:
        tables = inputs.tables_RNM[rotation]
        q = inputs.q_RNHL[rotation]
        positions = inputs.positions_N
        scale = inputs.scale_N
        return paged_mla_decode(q, scale, inputs.cache, tables, positions, scratch, latent_rank=LATENT)

    def whole(rotation: int) -> Tensor:
        schedule_decode(inputs.positions_N, scratch, cell.heads)
        return attend(rotation)

    return {"whole": whole, "kernels": attend}


def inexact_plan(cell: Cell, timer: Timer) -> Plan:
    """Splits by batch; see benchmarks/inexact.py."""
    if timer.is_dry:
        return plan_of(cell.heads)
    programs = torch.cuda.get_device_properties(timer.device).multi_processor_count
    return plan_for(cell.heads, cell.batch * cell.q_len, cell.longest, programs)


def measure(cell: Cell, cache: Cache, peers: Peers, timer: Timer) -> Outcome:
    inputs = make_inputs(cell, cache, cache.rotations(cell, timer.rotations(cell.num_bytes)))
    calls = our_calls(cell, inputs)
    error = error_of(calls["whole"](inputs.rotations - 1), inputs, inputs.rotations - 1)
    if not error.cosine < MOST_COSINE:
        timer.failures.append(f"{cell.name}: the result is wrong, cosine error {error.cosine:.0e}")
    graphs: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        graphs |= timer.graphs({f"ours, {name}": call}, inputs.rotations)
    if cell.is_compared:
        inexact = our_calls(cell, inputs, inexact_plan(cell, timer))["whole"]
        graphs |= timer.graphs({"ours, inexact": inexact}, inputs.rotations)
    for name, make in peers.of(cell, inputs).items():
        peer = timer.attempt(f"{name}, {cell.name}", make, timer.remarks)
        if peer is None:
            continue
        both = {name: peer.kernels} | ({} if peer.whole is None else {f"{name}, whole": peer.whole})
        graphs |= timer.graphs(both, inputs.rotations, timer.remarks)
    taken = timer.replay(graphs)
    times = {name: Sample(*(value / inputs.rotations for value in sample)) for name, sample in taken.items()}
    return Outcome(cell, times, error)


def row(outcome: Outcome, ceilings: Ceilings) -> list[str]:
    cell = outcome.cell
    whole = outcome.seconds("ours, whole")
    kernels = outcome.seconds("ours, kernels")
    peer, theirs = outcome.best_peer
    rate = cell.num_bytes / kernels
    flops = cell.flops / kernels
    cost = whole / outcome.seconds("ours, inexact") - 1
    spread = outcome.times.get("ours, kernels", Sample(*[math.nan] * 3))
    return [
        cell.name,
        f"{cell.num_bytes / 1e6:,.1f}",
        f"{whole * 1e6:.1f}",
        f"{kernels * 1e6:.1f}",
        f"{(spread.high - spread.low) / kernels:.0%}" if kernels == kernels else "",
        f"{rate / 1e9:,.0f}",
        f"{rate / ceilings.read_bytes_per_s:.0%}" if rate == rate else "",
        f"{flops / 1e12:.0f}",
        f"{flops / ceilings.matmul_flops:.0%}" if flops == flops else "",
        f"{peer} {theirs * 1e6:.1f}" if peer else "",
        f"{theirs / kernels:.2f}" if peer else "",
        f"{cost:+.1%}" if cost == cost else "",
        f"{outcome.error.largest:.0e}",
        f"{outcome.error.cosine:.0e}",
    ]


HEADER = (
    "heads x batch x context|MB|whole us|kernels us|spread|GB/s|of read|TFLOP/s|of matmul|best peer us|ratio".split("|")
)
HEADER += "exactness costs|max abs|cosine".split("|")


def geometric_mean(values: Iterator[float]) -> str:
    logs = [math.log(value) for value in values if value > 0]  # false for NaN
    return f"{math.exp(sum(logs) / len(logs)):.2f} over {len(logs)}" if logs else "none"


def summary(outcomes: list[Outcome], ceilings: Ceilings) -> list[list[str]]:
    """The goals this grid decides, each with what was seen."""

    def ratios(heads: int, least_batch: int = 1, least_context: int = 1) -> Iterator[float]:
        for one in outcomes:
            cell = one.cell
            peer, theirs = one.best_peer
            is_asked = (cell.heads, cell.rows) == (heads, "bf16") and "SDPA" not in peer
            if is_asked and cell.batch >= least_batch and cell.context >= least_context:
                yield theirs / one.seconds("ours, kernels")

    large = [one for one in outcomes if one.cell.heads == 16 and one.cell.num_bytes >= LARGE_BYTES]
    shares = (
        one.cell.num_bytes / one.seconds("ours, whole") / ceilings.read_bytes_per_s
        for one in large
        if one.cell.rows == "bf16"
    )
    bf16 = {one.cell: one.seconds("ours, kernels") for one in outcomes}
    gains = (
        bf16.get(replace(one.cell, rows="bf16"), math.nan) / one.seconds("ours, kernels")
        for one in outcomes
        if one.cell.rows == "fp8" and one.cell.heads == 16
    )
    costs = (one.seconds("ours, whole") / one.seconds("ours, inexact") for one in outcomes)
    return [
        ["16 heads, 150 MB or more, whole: share of the read ceiling", "0.85 to 0.95", geometric_mean(shares)],
        ["16 heads: best paged peer / ours", "0.95 to 1.10", geometric_mean(ratios(16))],
        [
            "128 heads, batch 8, 4k or more: best paged peer / ours",
            "0.70 to 1.00",
            geometric_mean(ratios(128, 8, 4096)),
        ],
        ["16 heads: bf16 rows / fp8 rows", "1.40 to 1.65", geometric_mean(gains)],
        ["exact / inexact", "1.05 at most", geometric_mean(costs)],
    ]


def cache_for(cells: list[Cell], timer: Timer) -> Cache:
    """With room for the largest cell, or what memory allows."""
    wanted = max(cell.batch * cell.blocks_per_row for cell in cells)
    fp8 = [cell.batch * cell.blocks_per_row for cell in cells if cell.rows == "fp8"]
    wanted_fp8 = min(FP8_MOST_BLOCKS, max(fp8, default=0))
    if timer.is_dry:
        return Cache(2 * wanted, timer.device, 2 * wanted_fp8)
    wanted = max(wanted, 2 * FP8_MOST_BLOCKS)  # two rotations of what fp8 cells take
    free, _ = torch.cuda.mem_get_info()
    most = int(MEMORY_SHARE * free) // (BLOCK * 1152)
    return Cache(min(wanted, most), timer.device, min(wanted_fp8 and 2 * FP8_MOST_BLOCKS, most // 2))


def table(ceilings: Ceilings, report: Report, timer: Timer, *, quick: bool) -> None:
    cells = dry_grid() if timer.is_dry else quick_grid() if quick else grid()
    cache = cache_for(cells, timer)
    peers = Peers()
    report.say("", *peers.missing)
    outcomes = []
    left_out = []
    for cell in cells:
        if not timer.has_time or not cache.holds(cell):
            left_out.append(cell.name)
            continue
        if outcome := timer.attempt(cell.name, partial(measure, cell, cache, peers, timer)):
            outcomes.append(outcome)
    note = (
        "Paged MLA decode, shuffled blocks of 64, caches cold. Whole: a graph of schedule, attention and combination; "
        "kernels: without the schedule, which all layers of a step share. Rates and ratios are of the kernels."
    )
    report.table(HEADER, [row(outcome, ceilings) for outcome in outcomes], note)
    report.table(("goal", "floor to moonshot", "geometric mean"), summary(outcomes, ceilings))
    if left_out:
        report.say("", f"Left out for memory or time: {', '.join(left_out)}.")
