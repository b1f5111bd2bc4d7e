"""What is bound by bytes or launches: norms, activation, latents into the cache, blocks out and in, routing."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from benchmarks.gpu_timing import Call, Ceilings, Report, Timer
from benchmarks.kernels.products import normal
from kernels.elementwise.rows import add_rms_norm, rms_norm, swiglu
from kernels.experts.definition import RouterRule
from kernels.experts.routing import route
from kernels.latents.store import store_latents
from kernels.latents.transfer import gather_rows, scatter_rows

DECODE_ROWS = (1, 32, 128)
V2_ROUTING = RouterRule(True, 1, 6, 1, 1, False, 1.0)  # noqa: FBT003 — a row of constants
V3_ROUTING = RouterRule(False, 2, 8, 8, 4, True, 2.5)  # noqa: FBT003


class Case(NamedTuple):
    name: str
    num_bytes: int  # of one call: read and written
    call: Call
    rotations: int = 2


def norms(timer: Timer, rows: int, width: int) -> Iterator[Case]:
    """Rows of the residual stream lie in L2 from the kernel before, here as in a step."""
    x, delta, weight = (normal(timer, *shape) for shape in ((rows, width), (rows, width), (width,)))
    gate_up = normal(timer, rows, 4 * width)
    size = 2 * rows * width
    yield Case(f"rms_norm, {rows} x {width}", 2 * size, lambda _: rms_norm(x, weight, 1e-6))
    yield Case(
        f"add and norm, {rows} x {width}",
        4 * size,
        lambda _: add_rms_norm(x, delta, weight, 1e-6, 1.0),
    )
    yield Case(f"swiglu, {rows} x {2 * width}", 6 * size, lambda _: swiglu(gate_up))


def cached_rows(timer: Timer, rows: int) -> Iterator[Case]:
    """Norm, rotation and store of 512 + 64 elements of each row, from the projection of V2-Lite."""
    C = 512
    R = 64
    start = 3072
    num_slots = 1 << 10 if timer.is_dry else 1 << 18
    qkv = normal(timer, rows, start + C + R)
    weight = normal(timer, C)
    tables = [torch.randn(1024, R, device=timer.device) for _ in range(2)]
    positions = torch.randint(1024, (rows,), dtype=torch.int32, device=timer.device)
    slots = torch.randperm(num_slots, device=timer.device)[:rows]
    for name, cache in (("bf16", normal(timer, num_slots // 64, 64, C + R)), ("fp8", None)):
        if cache is None:
            cache = torch.zeros(num_slots // 64, 64, 656, dtype=torch.uint8, device=timer.device)

        def call(_: int, cache: torch.Tensor = cache) -> None:
            store_latents(qkv, weight, 1e-6, *tables, positions, slots, cache, latent_start=start)

        size = rows * ((C + R) * 2 + cache.shape[2] * cache.element_size() + 8 * R)
        yield Case(f"store latents as {name}, {rows}", size, call)


def moved_blocks(timer: Timer, row_bytes: int) -> Iterator[Case]:
    """4,096 rows in shuffled blocks of 64, as a transfer takes them out and puts them in."""
    count, num_blocks = (128, 8) if timer.is_dry else (4096, 1 << 13)
    cache = torch.randint(256, (num_blocks * 64, row_bytes), dtype=torch.uint8, device=timer.device)
    size = 2 * count * row_bytes
    rotations = min(timer.rotations(size), num_blocks * 64 // count)
    chosen = torch.randperm(num_blocks, device=timer.device)[: rotations * count // 64]
    slots = (chosen[:, None] * 64 + torch.arange(64, device=timer.device)).view(rotations, count)
    out = torch.empty(rotations, count, row_bytes, dtype=torch.uint8, device=timer.device)
    gather = Case(
        f"gather {count} rows of {row_bytes} B", size, lambda i: gather_rows(cache, slots[i], out[i]), rotations
    )
    yield gather
    yield gather._replace(
        name=f"scatter {count} rows of {row_bytes} B", call=lambda i: scatter_rows(cache, slots[i], out[i])
    )


def routing(timer: Timer, rows: int) -> Iterator[Case]:
    for name, experts, rule in (("V2-Lite", 64, V2_ROUTING), ("V3", 256, V3_ROUTING)):
        logits = torch.randn(rows, experts, device=timer.device)
        bias = None if rule.softmax else torch.randn(experts, device=timer.device)
        size = rows * (4 * experts + 8 * rule.num_chosen)

        def call(
            _: int, logits: torch.Tensor = logits, bias: torch.Tensor | None = bias, rule: RouterRule = rule
        ) -> None:
            route(logits, bias, rule)

        yield Case(f"route {name}, {rows}", size, call)


def cases(timer: Timer) -> Iterator[Case]:
    for rows in (2,) if timer.is_dry else (*DECODE_ROWS, 4096):
        yield from norms(timer, rows, 256 if timer.is_dry else 2048)
        yield from cached_rows(timer, rows)
        yield from routing(timer, rows)
    for row_bytes in (1152, 656):
        yield from moved_blocks(timer, row_bytes)


def table(ceilings: Ceilings, report: Report, timer: Timer) -> None:
    rows = []
    for case in cases(timer):
        taken = timer.compare({case.name: case.call}, case.rotations)
        if case.name not in taken:
            continue
        seconds = taken[case.name].median
        rate = case.num_bytes / seconds
        share = f"{rate / ceilings.copy_bytes_per_s:.0%}" if case.rotations > 2 else "in L2"
        rows.append([case.name, f"{seconds * 1e6:.2f}", f"{rate / 1e9:,.0f}", share])
    note = "Bound by bytes or launches. What a step finds in L2, from the kernel before, is found there here too."
    report.table(("kernel", "us", "GB/s", "of copy"), rows, note)
