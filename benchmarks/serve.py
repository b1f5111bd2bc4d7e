"""Tokens per second, TTFT and ITL of the stack beside transformers' generate, on the same checkpoint, dtype and cores.

    python -m benchmarks.serve [--dtype fp32] [--prompt-tokens 128] [--max-tokens 64] [--rounds 3]

The two take turns at each concurrency. transformers runs a batch of that size (its prompts have equal lengths, so it
pads nothing) with one thread or as many as there are cores, whichever is faster here; its TTFT is the time of
generating one token.
"""

import argparse
import asyncio
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import describe, quantile
from isthmus.testing.stack import Client, request, running_stack

CONCURRENCIES = (1, 4, 16)
BUNDLED = Path(__file__).resolve().parent.parent / "isthmus" / "bundled"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Figures(NamedTuple):
    tokens_per_s: float
    ttft_ms: float
    itl_p50_ms: float
    itl_p99_ms: float


def prompts(count: int, length: int, salt: int) -> list[list[int]]:
    """Different from round to round, so that no prefix cache helps."""
    return [
        [10 + (salt * 7919 + row * 131 + position * 17) % 2000 for position in range(length)] for row in range(count)
    ]


async def run_stack(router: str, batch: list[list[int]], max_tokens: int) -> Figures:
    async with Client(router) as client:
        began = time.monotonic()

        async def one(prompt: list[int]) -> tuple[float, list[float]]:
            sent = time.monotonic()
            result = await client.generate(request(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
            times = result.arrival_s
            return times[0] - sent, [after - before for before, after in itertools.pairwise(times)]

        answers = await asyncio.gather(*(one(prompt) for prompt in batch))
        spent = time.monotonic() - began
    gaps = [gap for _, stream in answers for gap in stream]
    ttft = statistics.median(first for first, _ in answers)
    return Figures(len(batch) * max_tokens / spent, ttft * 1e3, quantile(gaps, 0.5) * 1e3, quantile(gaps, 0.99) * 1e3)


def run_transformers(model: torch.nn.Module, batch: list[list[int]], max_tokens: int) -> Figures:
    ids = torch.tensor(batch)
    mask = torch.ones_like(ids)

    def generate(num_tokens: int) -> float:
        began = time.monotonic()
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        return time.monotonic() - began

    first, whole = generate(1), generate(max_tokens)
    gap = (whole - first) / (max_tokens - 1)
    return Figures(len(batch) * max_tokens / whole, first * 1e3, gap * 1e3, gap * 1e3)


def choose_threads(model: torch.nn.Module) -> int:
    """Two spinning OpenMP teams slow each other down, so more threads are not always faster."""
    speeds = {}
    for threads in {1, len(os.sched_getaffinity(0))}:
        torch.set_num_threads(threads)
        run_transformers(model, prompts(1, 64, 98), 4)
        speeds[threads] = run_transformers(model, prompts(1, 64, 98), 24).tokens_per_s
    best = max(speeds, key=lambda threads: speeds[threads])
    torch.set_num_threads(best)
    return best


def median(rows: list[Figures]) -> Figures:
    return Figures(*(statistics.median(column) for column in zip(*rows, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=DTYPES[args.dtype]).eval()
    print(f"serve, bundled checkpoint, {args.dtype}, {args.prompt_tokens} + {args.max_tokens} tokens; {describe()}")
    print(f"{'at once':>7}  {'system':<13}{'tokens/s':>9}{'TTFT ms':>9}{'ITL p50':>9}{'ITL p99':>9}{'ratio':>7}")
    with running_stack("--dtype", args.dtype) as stack, torch.inference_mode():
        asyncio.run(run_stack(stack.router, prompts(1, args.prompt_tokens, 99), 8))
        print(f"transformers uses {choose_threads(model)} thread(s)")
        for concurrency in CONCURRENCIES:
            ours, theirs = [], []
            for round_number in range(args.rounds):
                batch = prompts(concurrency, args.prompt_tokens, concurrency * 100 + round_number)
                ours.append(asyncio.run(run_stack(stack.router, batch, args.max_tokens)))
                theirs.append(run_transformers(model, batch, args.max_tokens))
            ratio = statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True))
            for system, figures, shown in (
                ("isthmus", median(ours), f"{ratio:.2f}"),
                ("transformers", median(theirs), "1.00"),
            ):
                numbers = "".join(f"{value:9.1f}" for value in figures)
                print(f"{concurrency:>7}  {system:<13}{numbers}{shown:>7}")


if __name__ == "__main__":
    main()
