"""What the GPU benchmarks share: interleaved timing of CUDA graphs, the machine's ceilings, and the report.

A call is timed as a graph of many, each on another rotation of its data, so that more than the L2 cache passes between
two uses of a byte. Graphs of all contenders take turns, in an order that reverses every time; a figure is the median.
Without a GPU (`--dry-run`) every call runs once under Triton's interpreter, and no time is taken.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from benchmarks.machine import describe, describe_gpu, quantile
from kernels.lang import INTERPRETED

COLD = 4  # rotations hold so many times the L2 cache
Made = TypeVar("Made")
Call = Callable[[int], object]  # does the work on one rotation


class Sample(NamedTuple):
    """Seconds of one call."""

    median: float
    low: float  # tenth percentile
    high: float  # ninetieth


@dataclass
class Timer:
    """Times calls on `device`; what fails is listed in `failures`, of peers in `remarks`, and the run goes on."""

    device: torch.device
    budget_s: float  # sections stop asking for more when it is spent
    repetitions: int = 30
    failures: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def is_dry(self) -> bool:
        return self.device.type != "cuda"

    @property
    def has_time(self) -> bool:
        return time.monotonic() - self.began < self.budget_s

    def attempt(self, name: str, make: Callable[[], Made], failures: list[str] | None = None) -> Made | None:
        """What `make` returns; None if it raises, which is then said in `failures` [the timer's]."""
        try:
            return make()
        except Exception as error:  # noqa: BLE001 — one that cannot run must not end the others
            lines = str(error).strip().splitlines() or [""]
            (self.failures if failures is None else failures).append(
                f"{name}: {type(error).__name__}: {lines[0][:200]}"
            )
            return None

    def rotations(self, num_bytes: int) -> int:
        """How many sets of data of this size make every use of one cold."""
        if self.is_dry:
            return 2
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, -(-COLD * l2_bytes // num_bytes))

    def compare(self, calls: Mapping[str, Call], rotations: int) -> dict[str, Sample]:
        """Of those that ran: seconds of one call on one rotation."""
        taken = self.replay(self.graphs(calls, rotations))
        return {name: Sample(*(value / rotations for value in sample)) for name, sample in taken.items()}

    def graphs(
        self, calls: Mapping[str, Call], rotations: int, failures: list[str] | None = None
    ) -> dict[str, Callable[[], object]]:
        """Captured, to be replayed; every call warms up outside its graph, compiling what it needs.

        What fails is left out, and said in `failures` [the timer's].
        """
        runs = {
            name: self.attempt(name, partial(self._graph, call, rotations), failures) for name, call in calls.items()
        }
        return {name: run for name, run in runs.items() if run is not None}

    def replay(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, Sample]:
        """Of graphs, or what launches one: seconds of each, taking turns."""
        if self.is_dry:
            for run in runs.values():
                run()
            return dict.fromkeys(runs, Sample(*[float("nan")] * 3))
        marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for repetition in range(self.repetitions + 1):  # the first warms up
            for name in list(runs) if repetition % 2 else list(reversed(runs)):
                begin = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                begin.record()
                runs[name]()
                end.record()
                marks[name].append((begin, end))
        torch.cuda.synchronize()
        seconds = {name: [begin.elapsed_time(end) / 1e3 for begin, end in taken[1:]] for name, taken in marks.items()}
        return {
            name: Sample(statistics.median(taken), quantile(taken, 0.1), quantile(taken, 0.9))
            for name, taken in seconds.items()
        }

    def _graph(self, call: Call, rotations: int) -> Callable[[], object]:
        if self.is_dry:
            call(rotations - 1)
            return lambda: None
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for rotation in range(2):
                call(rotation % rotations)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for rotation in range(rotations):
                call(rotation)
        return graph.replay


@triton.jit
def _read(x_ptr, out_ptr, num_elements, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Each program sums STEPS blocks of int32 that lie side by side."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK * STEPS
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in range(STEPS):
        offsets = first + step * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < num_elements, other=0)
    tl.store(out_ptr + program, tl.sum(total, axis=0))


class Ceilings(NamedTuple):
    """Of this machine in this run, on random data."""

    read_bytes_per_s: float  # the best of several shapes of our own pure-read kernel
    copy_bytes_per_s: float  # read and written
    matmul_flops: float  # torch.mm, bf16, 8192 x 8192 x 8192

    @property
    def line(self) -> str:
        read = self.read_bytes_per_s / 1e9
        copy = self.copy_bytes_per_s / 1e9
        matmul = self.matmul_flops / 1e12
        return f"Ceilings, this run: read {read:,.0f} GB/s, copy {copy:,.0f} GB/s, bf16 matmul {matmul:,.0f} TFLOP/s."


def measure_ceilings(timer: Timer) -> Ceilings:
    num_elements, side = (1 << 14, 64) if timer.is_dry else (1 << 30, 8192)
    most = 1 << (12 if timer.is_dry else 31)  # the interpreter's sums do not wrap
    x = torch.randint(-most, most - 1, (num_elements,), dtype=torch.int32, device=timer.device)
    other = torch.empty_like(x)
    a, b = (torch.randn(side, side, device=timer.device).bfloat16() for _ in range(2))

    def read(block: int, steps: int, num_warps: int) -> Call:
        grid = triton.cdiv(num_elements, block * steps)
        out = torch.empty(grid, dtype=torch.int32, device=timer.device)
        if timer.is_dry:
            _read[(grid,)](x, out, num_elements, BLOCK=block, STEPS=steps, num_warps=num_warps)
            assert out.sum(dtype=torch.int32) == x.sum(dtype=torch.int32), "the read kernel misses elements"
        return lambda _: _read[(grid,)](x, out, num_elements, BLOCK=block, STEPS=steps, num_warps=num_warps)

    shapes = [(4096, 4, 4), (8192, 4, 8), (8192, 16, 8), (16384, 8, 16)]
    calls: dict[str, Call] = {f"read {shape}": read(*shape) for shape in shapes[: 1 if timer.is_dry else None]}
    calls |= {"copy": lambda _: other.copy_(x), "matmul": lambda _: torch.mm(a, b)}
    times = timer.compare(calls, 2)
    read_s = min(sample.median for name, sample in times.items() if name.startswith("read"))
    num_bytes = 4 * num_elements
    return Ceilings(num_bytes / read_s, 2 * num_bytes / times["copy"].median, 2 * side**3 / times["matmul"].median)


@dataclass
class Report:
    """Prints Markdown as it comes and writes the same to `out` at the end."""

    title: str
    out: Path | None
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        date = datetime.datetime.now(datetime.UTC).date()
        self.say(f"# {self.title}, {date}", "", f"{describe_gpu()}.", "", f"{describe()}.")

    def say(self, *lines: str) -> None:
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
        """A Markdown table, after an empty line and the note; every column is as wide as its widest cell."""
        lines = [header, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]  # figures end together
            for line in lines
        ]
        rule = ["-" * (width - 1) + ":" for width in widths]
        aligned.insert(1, rule)
        self.say("")
        if note:
            self.say(note, "")
        self.say(*(f"| {' | '.join(line)} |" for line in aligned))

    def finish(self, timer: Timer) -> int:
        """Writes the file; the exit status is 1 when something failed."""
        for title, lines in (("Left out:", timer.remarks), ("Failed:", timer.failures)):
            if lines:
                self.say("", title, "", *(f"- {line}" for line in dict.fromkeys(lines)))
        if timer.is_dry:
            self.say("", "Dry run: the figures mean nothing.")
        self.say("", f"{time.monotonic() - timer.began:.0f} s in all.")
        if self.out:
            self.out.write_text("\n".join(self.lines) + "\n", encoding="utf-8")
        return 1 if timer.failures else 0


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options every GPU benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, metavar="FILE", help="Markdown file to write")
    made.add_argument("--dry-run", action="store_true", help="tiny shapes under TRITON_INTERPRET=1, nothing is timed")
    made.add_argument("--budget", type=float, default=400, metavar="SECONDS", help="begin no other cell after it [400]")
    return made


def open_timer(args: argparse.Namespace) -> Timer:
    """On the first GPU, or on the CPU for a dry run."""
    if args.dry_run and not INTERPRETED:
        raise SystemExit("--dry-run interprets the kernels: set TRITON_INTERPRET=1")
    if not args.dry_run and (INTERPRETED or not torch.cuda.is_available()):
        raise SystemExit("no CUDA device, or TRITON_INTERPRET is set: only --dry-run works here")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return Timer(torch.device("cpu" if args.dry_run else "cuda:0"), args.budget)
