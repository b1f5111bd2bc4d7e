"""The whole stack on one GPU, a prefill and a decode worker as two processes: latency, hand-off, interference.

    python -m benchmarks.gpu_stack [--model DIR] [--layers 4] [--prompt-tokens 4096] [--requests 20] [--out FILE]

Without --model: V2-Lite's shapes with random weights and so many layers, written to a temporary directory. Both
workers share the GPU's multiprocessors, so nothing here says that splitting the roles makes more tokens per second.
Interference is the gap between two tokens of running streams while long prompts keep arriving; "one engine" is what it
would be without splitting: the same engine in one process computes a chunk of a long prompt between two decode steps.
"""

import argparse
import asyncio
import contextlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_timing import Report, Timer, open_timer, parser
from benchmarks.machine import quantile
from isthmus.checkpoint.directory import Checkpoint
from isthmus.engine.engine import Engine
from isthmus.steps import DecodeRow, PrefillChunk
from isthmus.testing.stack import Result, Stack, StackClient, ledger, request, running_stack
from tools.checkpoints import Recipe, write_checkpoint

# Token ids that every checkpoint here has.
FIRST_ID = 300
NUM_IDS = 1500
STREAMS = 8  # that run while long prompts arrive
CHUNK = 512  # tokens of a long prompt between two decode steps of one engine


class Load(NamedTuple):
    prompt_tokens: int
    max_tokens: int
    requests: int


def prompt(length: int, salt: int) -> list[int]:
    """Different for every salt, so that no prefix is found again."""
    return random.Random(salt).choices(range(FIRST_ID, FIRST_ID + NUM_IDS), k=length)


def gaps_ms(result: Result) -> list[float]:
    return [(after - before) * 1e3 for before, after in itertools.pairwise(result.arrival_s)]


def generate(client: StackClient, length: int, salt: int, max_tokens: int) -> "asyncio.Task[Result]":
    message = request(prompt(length, salt), max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return asyncio.create_task(client.generate(message, timeout_s=300))


def quantiles(values: Sequence[float]) -> str:
    return f"{quantile(list(values), 0.5):.2f} / {quantile(list(values), 0.99):.2f}"


class One(NamedTuple):
    """A request by itself, in milliseconds and bytes per second."""

    ttft: float
    itl: list[float]
    handoff: float
    prefill: float
    exposed: float
    rate: float


async def one_at_a_time(stack: Stack, load: Load) -> list[One]:
    (prefill,) = stack.services("prefill")
    taken = []
    async with StackClient(stack.router) as client:
        for number in range(load.requests + 2):
            sent = time.monotonic()
            result = await generate(client, load.prompt_tokens, 1000 + number, load.max_tokens)
            assert result.finished is not None, "generate returns finished streams"
            assert result.accepted is not None, "generate returns accepted streams"
            timings = result.finished.timings
            at = {
                event.event: event.monotonic_ns for event in await ledger(prefill["grpc"], result.accepted.request_id)
            }
            seconds = (at["transfer.acked"] - at["transfer.first_frame_sent"]) / 1e9
            ttft_ms = (result.arrival_s[0] - sent) * 1e3
            rate = timings.transfer_bytes / seconds
            phases = timings.handoff_ms, timings.prefill_ms, timings.transfer_exposed_ms
            taken.append(One(ttft_ms, gaps_ms(result)[1:], *phases, rate))
    return taken[2:]


async def at_once(stack: Stack, load: Load, count: int) -> tuple[float, list[float], list[float]]:
    """Tokens per second, TTFT and gaps in milliseconds of `count` requests sent together."""
    async with StackClient(stack.router) as client:
        began = time.monotonic()
        tasks = [generate(client, load.prompt_tokens, 5000 + number, load.max_tokens) for number in range(count)]
        results = await asyncio.gather(*tasks)
        spent = time.monotonic() - began
    ttft = [(result.arrival_s[0] - began) * 1e3 for result in results]
    return count * load.max_tokens / spent, ttft, [gap for result in results for gap in gaps_ms(result)[1:]]


async def interference(stack: Stack, load: Load, *, arriving: int) -> list[float]:
    """Gaps of STREAMS running streams while `arriving` long prompts at a time are computed."""
    async with StackClient(stack.router) as client:
        streams = [generate(client, 32, 9000 + number, 4 * load.max_tokens) for number in range(STREAMS)]
        salts = itertools.count(20_000 + 1000 * arriving)

        async def keep_sending() -> None:
            while True:
                await generate(client, load.prompt_tokens, next(salts), 1)

        senders = [asyncio.create_task(keep_sending()) for _ in range(arriving)]
        results = await asyncio.gather(*streams)
        for sender in senders:
            sender.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
    return [gap for result in results for gap in gaps_ms(result)[2:]]


def one_engine(folder: Path, load: Load, timer: Timer) -> tuple[list[float], list[float]]:
    """Milliseconds of decode steps alone, and with a chunk of a long prompt before each."""
    num_blocks = (STREAMS + 1) * -(-(load.prompt_tokens + 8 * load.max_tokens) // 64)
    checkpoint = Checkpoint.open(folder, load.prompt_tokens + 8 * load.max_tokens)
    device, dtype = ("cpu", "fp32") if timer.is_dry else ("cuda", "bf16")
    engine = Engine.open(checkpoint, dtype=dtype, device=device, block_size=64, num_blocks=num_blocks)
    tables = [engine.pool.allocate(engine.layout.num_blocks(32 + 8 * load.max_tokens)) for _ in range(STREAMS)]
    long_table = engine.pool.allocate(engine.layout.num_blocks(load.prompt_tokens))
    for number, table in enumerate(tables):
        engine.runner.prefill([PrefillChunk(prompt(32, number), 0, table, needs_logits=False)])
    chunk = min(CHUNK, load.prompt_tokens)
    starts = itertools.cycle(range(0, load.prompt_tokens - chunk + 1, chunk))

    def step(position: int, *, interrupted: bool) -> float:
        began = time.perf_counter()
        if interrupted:
            first = next(starts)
            ids = prompt(load.prompt_tokens, 1)[first : first + chunk]
            engine.runner.prefill([PrefillChunk(ids, first, long_table, needs_logits=False)])
        logits = engine.runner.decode([DecodeRow(FIRST_ID, position, table) for table in tables])
        logits.argmax(-1).tolist()
        return (time.perf_counter() - began) * 1e3

    for warm_up in (False, True):
        step(32, interrupted=warm_up)
    alone, interrupted = (
        [step(33 + number, interrupted=mode) for number in range(4 * load.max_tokens)] for mode in (False, True)
    )
    return alone, interrupted


@contextlib.contextmanager
def checkpoint_folder(args: argparse.Namespace) -> Iterator[Path]:
    if args.model:
        yield args.model
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield write_checkpoint(Path(temporary) / "model", Recipe("deepseek-v2-lite", "full", args.layers))


def measure_stack(folder: Path, load: Load, report: Report, timer: Timer) -> None:
    context = load.prompt_tokens + 8 * load.max_tokens
    flags = ["--model", str(folder), "--context-length", str(context), "--block-size", "64"]
    environment = {}
    if not timer.is_dry:
        flags += ["--dtype", "bf16", "--cache-bytes", "2GiB"]
        environment = {"ISTHMUS_DEVICE": "cuda"}
    with running_stack(*flags, env=environment, ready_timeout_s=300) as stack:
        alone = asyncio.run(one_at_a_time(stack, load))
        itl = [gap for one in alone for gap in one.itl]
        exposed_of_prefill = statistics.median(one.exposed / one.prefill for one in alone)
        rows = [
            ("TTFT ms", quantiles([one.ttft for one in alone])),
            ("gap between tokens ms", quantiles(itl)),
            ("hand-off ms, token 0 to token 1", quantiles([one.handoff for one in alone])),
            ("prefill ms", quantiles([one.prefill for one in alone])),
            ("transfer left when prefill ends ms", quantiles([one.exposed for one in alone])),
            ("its share of prefill", f"{exposed_of_prefill:.1%}"),
            ("transfer GB/s, first frame to last ack", quantiles([one.rate / 1e9 for one in alone])),
        ]
        report.table(("one request at a time", "p50 / p99"), rows)
        counts = (2,) if timer.is_dry else (1, 8, 32)
        rows = []
        for count in counts:
            rate, ttft, gaps = asyncio.run(at_once(stack, load, count))
            rows.append((str(count), f"{rate:,.0f}", quantiles(ttft), quantiles(gaps)))
        report.table(("at once", "tokens/s", "TTFT ms p50 / p99", "gap ms p50 / p99"), rows)
        calm, busy = (asyncio.run(interference(stack, load, arriving=count)) for count in (0, 2))
    with torch.inference_mode():
        apart = one_engine(folder, load, timer)
    rows = [
        ("two workers", quantiles(calm), quantiles(busy)),
        (f"one engine, {CHUNK} tokens between steps", *map(quantiles, apart)),
    ]
    report.table(
        (f"{STREAMS} streams, gap ms p50 / p99", "alone", f"{load.prompt_tokens}-token prompts arriving"), rows
    )


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--model", type=Path, metavar="DIR", help="[V2-Lite's shapes, --layers of them]")
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--prompt-tokens", type=int, default=4096)
    made.add_argument("--max-tokens", type=int, default=64)
    made.add_argument("--requests", type=int, default=20)
    args = made.parse_args()
    timer = open_timer(args)
    load = Load(args.prompt_tokens, args.max_tokens, args.requests)
    if args.dry_run:
        load = Load(96, 8, 2)
        args.model = Path(__file__).resolve().parent.parent / "isthmus/bundled"
    report = Report("The stack on one GPU", args.out)
    shapes = args.model.name if args.model else f"V2-Lite's shapes, {args.layers} layers, random weights"
    report.say("", f"{shapes}; {load.prompt_tokens} + {load.max_tokens} tokens, {load.requests} requests, 1P1D.")
    with checkpoint_folder(args) as folder:
        measure_stack(folder, load, report, timer)
    return report.finish(timer)


if __name__ == "__main__":
    raise SystemExit(main())
