"""CPU-seconds of the whole stack per 1,000 tokens, beside another checkout's: what a change costs in steady state.

    git worktree add ../before COMMIT
    python -m benchmarks.cpu_cost --before ../before [--rounds 12] [--concurrency 16] [--max-tokens 128]

Both stacks are up at once and take turns with the same requests; the idle one's CPU time is not counted. Prints the
median of each and of the ratio after / before, with a 95 % interval of the ratio by bootstrap over the rounds.
"""

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from benchmarks.machine import describe
from benchmarks.serve import prompts, run_stack
from isthmus.config import checkout_root, worker_environment
from isthmus.testing.stack import Stack, read_ready

PROMPT_TOKENS = 128
_RESAMPLES = 10_000


@contextlib.contextmanager
def stack_of(checkout: Path) -> Iterator[Stack]:
    """`isthmus up` as that checkout has it."""
    command = [sys.executable, "-m", "isthmus.cli", "up", "--json"]
    environment = {**worker_environment(), "PYTHONPATH": str(checkout)}
    process = subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield Stack(process, read_ready(process))
    finally:
        process.terminate()
        process.wait(20)


def cpu_seconds(stack: Stack) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in stack.pids()]
    return sum(spent.user + spent.system for spent in times)


def round_of(stack: Stack, number: int, concurrency: int, max_tokens: int) -> float:
    """CPU-seconds per 1,000 generated tokens."""
    began = cpu_seconds(stack)
    asyncio.run(run_stack(stack.router, prompts(concurrency, PROMPT_TOKENS, number), max_tokens))
    return (cpu_seconds(stack) - began) * 1000 / (concurrency * max_tokens)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % of the median."""
    source = random.Random(0)
    medians = sorted(statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES))
    return medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    print(
        f"CPU-seconds per 1,000 tokens, {args.concurrency} at once, {PROMPT_TOKENS} + {args.max_tokens}; {describe()}"
    )
    with stack_of(args.before.resolve()) as before, stack_of(checkout_root()) as after:
        stacks = {"before": before, "after": after}
        for stack in stacks.values():
            round_of(stack, 0, args.concurrency, args.max_tokens)
        spent: dict[str, list[float]] = {name: [] for name in stacks}
        for number in range(1, args.rounds + 1):
            order = sorted(stacks, reverse=number % 2 == 0)
            for name in order:
                spent[name].append(round_of(stacks[name], number, args.concurrency, args.max_tokens))
    for name, seconds in spent.items():
        print(f"{name:<7} median {statistics.median(seconds):.3f}  min {min(seconds):.3f}  max {max(seconds):.3f}")
    ratios = [ours / theirs for ours, theirs in zip(spent["after"], spent["before"], strict=True)]
    low, high = interval(ratios)
    print(f"after / before: {statistics.median(ratios):.3f}  (95 % interval {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
