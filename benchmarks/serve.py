"""Tokens per second, TTFT and ITL of the stack beside transformers' generate, on the same checkpoint, dtype and cores.

    python -m benchmarks.serve [--model DIR] [--dtype fp32] [--prompt-tokens 128] [--max-tokens 64] [--rounds 3]
        [--vllm-python ENV/bin/python]

They take turns at each concurrency. transformers runs a batch of that size (its prompts have equal lengths, so it
pads nothing) with one thread or as many as there are cores, whichever is faster here; its TTFT is the time of
generating one token. vLLM joins where an environment has it.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import describe, quantile
from isthmus.testing.stack import StackClient, request, running_stack

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
    async with StackClient(router) as client:
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

    return _of_batch(len(batch), max_tokens, generate(1), generate(max_tokens))


def _of_batch(size: int, max_tokens: int, first_s: float, whole_s: float) -> Figures:
    """Of a batch whose first tokens come together, and then one a step."""
    gap_ms = (whole_s - first_s) / (max_tokens - 1) * 1e3
    return Figures(size * max_tokens / whole_s, first_s * 1e3, gap_ms, gap_ms)


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


class VllmPeer:
    """vLLM in a process of its own."""

    def __init__(self, python: Path, model: Path, dtype: str, context_length: int):
        command = [str(python), str(Path(__file__).with_name("vllm_peer.py"))]
        dtype_name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        self._process = subprocess.Popen(
            [*command, str(model), dtype_name, str(context_length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        )
        self.version = self._answer()["version"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"vLLM ended with status {self._process.wait()}: run benchmarks/vllm_peer.py to see why")
        return json.loads(line)

    def run(self, batch: list[list[int]], max_tokens: int) -> Figures:
        assert self._process.stdin is not None
        print(json.dumps({"prompts": batch, "max_tokens": max_tokens}), file=self._process.stdin, flush=True)
        return _of_batch(len(batch), max_tokens, **self._answer())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED, metavar="DIR", help="[the bundled checkpoint]")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="of an environment with vLLM [no such peer]")
    args = parser.parse_args()
    context = args.prompt_tokens + args.max_tokens
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype]).eval()
    print(f"serve, {args.model.name}, {args.dtype}, {args.prompt_tokens} + {args.max_tokens} tokens; {describe()}")
    flags = ["--model", str(args.model), "--dtype", args.dtype, "--context-length", str(max(context, 256))]
    with running_stack(*flags, ready_timeout_s=900) as stack, torch.inference_mode(), contextlib.ExitStack() as closing:
        asyncio.run(run_stack(stack.router, prompts(1, args.prompt_tokens, 99), 8))
        print(f"transformers uses {choose_threads(model)} thread(s)")
        systems: dict[str, Callable[[list[list[int]], int], Figures]] = {
            "isthmus": lambda batch, count: asyncio.run(run_stack(stack.router, batch, count)),
            "transformers": lambda batch, count: run_transformers(model, batch, count),
        }
        if args.vllm_python:
            vllm = VllmPeer(args.vllm_python, args.model, args.dtype, max(context, 256))
            closing.callback(vllm.close)
            systems[f"vLLM {vllm.version}"] = vllm.run
            vllm.run(prompts(1, args.prompt_tokens, 97), 4)
        compare(systems, args)


def compare(systems: dict[str, Callable[[list[list[int]], int], Figures]], args: argparse.Namespace) -> None:
    """The systems take turns with the same prompts; ratios are isthmus's tokens per second over each one's."""
    print(f"{'at once':>7}  {'system':<13}{'tokens/s':>9}{'TTFT ms':>9}{'ITL p50':>9}{'ITL p99':>9}{'ratio':>7}")
    for concurrency in CONCURRENCIES:
        taken: dict[str, list[Figures]] = {name: [] for name in systems}
        for round_number in range(args.rounds):
            batch = prompts(concurrency, args.prompt_tokens, concurrency * 100 + round_number)
            for name, run in systems.items():
                taken[name].append(run(batch, args.max_tokens))
        for name, rows in taken.items():
            pairs = zip(taken["isthmus"], rows, strict=True)
            ratio = statistics.median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)
            numbers = "".join(f"{value:9.1f}" for value in median(rows))
            print(f"{concurrency:>7}  {name:<13}{numbers}{ratio:7.2f}", flush=True)


if __name__ == "__main__":
    main()
