"""A decode step at V2-Lite's shapes with random weights, against what its bytes allow and against transformers.

    python -m benchmarks.decode_step [--without-transformers] [--out FILE]

The roofline is the weights a step has to read (the experts its rows really choose, each once) and the cached rows, at
the read bandwidth measured in the same run. "graph" is the step's CUDA graph alone; "served" is a loop of steps as the
engine launches them, inputs staged each time. "inexact" is the same graph with our best choices that let a row's bits
depend on the others (benchmarks/inexact.py). transformers generates from prompts of the same length; its time per token
is the difference between a long and a short generation.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_timing import Call, Ceilings, Report, Timer, measure_ceilings, open_timer, parser
from benchmarks.inexact import plan_for, without_exactness
from benchmarks.random_model import dry_config, published_config, random_model
from benchmarks.roofline import Sizes
from isthmus.checkpoint.model_config import ModelConfig
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.triton_runner import TritonRunner
from isthmus.kv.planes import LATENT, kv_layout
from isthmus.model import Model, triton_layers
from isthmus.model.triton_model import TritonModel
from isthmus.steps import DecodeRow
from kernels.attention_decode.schedule import DecodeScratch
from tools.checkpoints.published import PUBLISHED

BLOCK = 64
MODEL = "deepseek-v2-lite"
GOALS = {(1, 4096): (0.45, 0.65), (32, 4096): (0.60, 0.80), (128, 4096): (0.60, 0.80)}  # floor, moonshot
SERVED_STEPS = 50


class Cell(NamedTuple):
    batch: int
    context: int


def open_model_cache(config: ModelConfig, num_blocks: int, device: torch.device) -> tuple[Model, LatentCache]:
    """Random weights, and a cache of random latents."""
    cache = LatentCache(kv_layout(config, "", dtype="bf16", block_size=BLOCK), num_blocks, device)
    for rows in cache.layers[LATENT]:
        for part in rows.split(4096):
            part.normal_()
    return random_model(config, device), cache


def open_runner(config: ModelConfig, cells: list[Cell], device: torch.device) -> TritonRunner:
    """With room for the largest cell."""
    num_blocks = max(cell.batch * -(-(cell.context + SERVED_STEPS) // BLOCK) for cell in cells)
    return TritonRunner(*open_model_cache(config, num_blocks, device), max_rows=max(cell.batch for cell in cells))


def rows_of(cell: Cell, runner: TritonRunner) -> list[DecodeRow]:
    """The last of `context` positions, in shuffled blocks; room for SERVED_STEPS more."""
    width = -(-(cell.context + SERVED_STEPS) // BLOCK)
    blocks = torch.randperm(runner.cache.shape.num_blocks)[: cell.batch * width].view(cell.batch, width).tolist()
    ids = torch.randint(runner.model.config.vocab_size, (cell.batch,)).tolist()
    return [DecodeRow(token, cell.context - 1, table) for token, table in zip(ids, blocks, strict=True)]


@contextmanager
def recorded_routes(num_rows: int) -> Iterator[list[Tensor]]:
    """Expert ids of the real rows of every sparse layer that runs inside."""
    route = triton_layers.route
    seen = []

    def recording(*arguments: Any) -> Any:
        weights, ids = route(*arguments)
        seen.append(ids[:num_rows].clone())
        return weights, ids

    triton_layers.route = recording
    try:
        yield seen
    finally:
        triton_layers.route = route


def experts_read(runner: TritonRunner, bucket: int, batch: int) -> int:
    """Distinct experts of the staged step, over all layers."""
    with recorded_routes(batch) as seen:
        runner.graphs.run_eagerly(bucket)
    return sum(ids.unique().numel() for ids in seen)


def seconds_served(runner: TritonRunner, rows: list[DecodeRow], timer: Timer) -> float:
    """Per step, positions advancing; the device is awaited once at the end."""
    steps = 1 if timer.is_dry else SERVED_STEPS
    began = time.perf_counter()
    for number in range(steps):
        runner.launch([replace(row, position=row.position + number) for row in rows]).argmax(-1)
    if not timer.is_dry:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def inexact_step(runner: TritonRunner, cell: Cell, timer: Timer) -> Call:
    """The staged step, attention split by the batch; tiles of rows come from the table."""
    config = runner.model.config
    bucket = runner.buffers.bucket_of(cell.batch)
    programs = 4 if timer.is_dry else torch.cuda.get_device_properties(timer.device).multi_processor_count
    plan = plan_for(config.num_heads, cell.batch, cell.context, programs)
    shape = (bucket, config.num_heads, config.kv_lora_rank, config.context_length)
    scratch = DecodeScratch.allocate(*shape, timer.device, plan=plan)
    model = TritonModel(runner.model)
    caches = runner.cache.layers[LATENT]
    return lambda _: model.decode(replace(runner.buffers.inputs(bucket), scratch=scratch), caches)


def measure(runner: TritonRunner, cell: Cell, ceilings: Ceilings, timer: Timer) -> tuple[list[str], float]:
    """A row of the table, and the seconds of a step's graph."""
    rows = rows_of(cell, runner)
    bucket = runner.buffers.bucket_of(cell.batch)
    runner.buffers.stage(rows, bucket)
    hit = experts_read(runner, bucket, cell.batch)
    calls = timer.graphs({"exact": lambda _: runner.graphs.run_eagerly(bucket)}, 1)
    with without_exactness(bucket):
        calls |= timer.graphs({"inexact": inexact_step(runner, cell, timer)}, 1)
    times = timer.replay(calls)
    exact, inexact = (times[name].median if name in times else float("nan") for name in ("exact", "inexact"))
    served = seconds_served(runner, rows, timer)
    sizes = Sizes(runner.model.config)
    weights = sizes.decode_weight_bytes(hit)
    cached = sizes.cache_bytes(cell.batch * cell.context)
    floor = (weights + cached) / ceilings.read_bytes_per_s
    goal = GOALS.get((cell.batch, cell.context))
    figures = [f"{cell.batch}", f"{cell.context}", f"{hit / max(1, sizes.num_sparse):.1f}", f"{weights / 1e9:.2f}"]
    figures += [f"{cached / 1e9:.2f}", f"{floor * 1e3:.2f}", f"{exact * 1e3:.2f}", f"{served * 1e3:.2f}"]
    figures += [f"{cell.batch / exact:,.0f}", f"{floor / exact:.0%}" if exact == exact else "nan"]
    figures += [f"{goal[0]:.0%} to {goal[1]:.0%}" if goal else "", f"{exact / inexact - 1:+.1%}"]
    return figures, exact


HEADER = [
    *("batch", "context", "experts a layer", "weights GB", "cache GB", "floor ms", "graph ms", "served ms", "tok/s"),
    *("of roofline", "goal", "exactness costs"),
]


def transformers_seconds(config: Any, cell: Cell, timer: Timer) -> float:
    """Of one token of the whole batch."""
    from transformers import AutoModelForCausalLM

    device = timer.device
    tokens = 2 if timer.is_dry else 16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (cell.batch, cell.context), device=device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}

    def generate(count: int) -> float:
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)[0, -1].item()
        return time.perf_counter() - began

    generate(2)
    return (generate(1 + tokens) - generate(1)) / tokens


def compare_with_transformers(ours: dict[Cell, float], timer: Timer, report: Report) -> None:
    try:
        from transformers import DeepseekV2Config
    except ImportError:
        report.say("", "peer transformers: not installed")
        return
    raw = {name: value for name, value in PUBLISHED[MODEL].items() if name != "architectures"}
    if timer.is_dry:
        raw |= {"hidden_size": 128, "intermediate_size": 208, "moe_intermediate_size": 64, "num_hidden_layers": 2}
        raw |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512, "bos_token_id": 0}
    rows = []
    for cell, seconds in ours.items():
        generate = partial(transformers_seconds, DeepseekV2Config(**raw), cell, timer)
        # It may run out of memory: it caches expanded keys and values.
        if theirs := timer.attempt(f"transformers, {cell}", generate, timer.remarks):
            figures = [f"{theirs * 1e3:.1f}", f"{cell.batch / theirs:,.0f}", f"{theirs / seconds:.1f}"]
            rows.append([f"{cell.batch}", f"{cell.context}", f"{seconds * 1e3:.2f}", *figures])
        free_memory(timer)
    report.table(("batch", "context", "ours ms", "transformers ms", "tok/s", "ratio (goal 10 to 20)"), rows)


def free_memory(timer: Timer) -> None:
    gc.collect()
    if not timer.is_dry:
        torch.cuda.empty_cache()


@torch.inference_mode()
def main() -> int:
    made = parser(__doc__)
    made.add_argument("--without-transformers", action="store_true")
    args = made.parse_args()
    timer = open_timer(args)
    report = Report("A decode step at V2-Lite's shapes, random weights, bf16", args.out)
    ceilings = measure_ceilings(timer)
    report.say("", ceilings.line)
    cells = [Cell(batch, context) for batch in (1, 32, 128) for context in (1024, 4096)]
    config = published_config(MODEL, context_length=8192)
    if timer.is_dry:
        cells = [Cell(3, 80)]
        config = dry_config()
    runner = open_runner(config, cells, timer.device)
    rows = []
    seconds = {}
    for cell in cells:
        if not timer.has_time:
            timer.remarks.append(f"{cell}: no time left")
        elif measured := timer.attempt(str(cell), partial(measure, runner, cell, ceilings, timer)):
            figures, seconds[cell] = measured
            rows.append(figures)
    report.table(HEADER, rows)
    if timer.has_time and not args.without_transformers:
        del runner
        free_memory(timer)
        wanted = {cell: taken for cell, taken in seconds.items() if timer.is_dry or cell in ((1, 4096), (32, 4096))}
        compare_with_transformers(wanted, timer, report)
    return report.finish(timer)


if __name__ == "__main__":
    raise SystemExit(main())
