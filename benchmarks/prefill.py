"""Prefill of one prompt at V2-Lite's shapes with random weights: tokens per second and share of the matmul ceiling.

    python -m benchmarks.prefill [--prompts 1024 4096 16384] [--out FILE]

FLOPs are those of the model (benchmarks/roofline.py): causal attention, keys and values expanded once, the head for one
token. The ceiling is torch.mm on random data in the same run. Each step is launched as the engine does, and takes turns
with the others; "chunked" computes the same prompt in steps of CHUNK tokens, as a worker does that other prompts share.
"""

from collections.abc import Callable

import torch

from benchmarks.decode_step import BLOCK, MODEL, open_model_cache
from benchmarks.gpu_timing import Report, Timer, measure_ceilings, open_timer, parser
from benchmarks.random_model import dry_config, published_config
from benchmarks.roofline import Sizes
from isthmus.engine.triton_runner import TritonRunner
from isthmus.steps import PrefillChunk

CHUNK = 2048
GOAL = (0.35, 0.50)  # of the ceiling at 4k: floor, moonshot


def chunks_of(prompt_tokens: int, runner: TritonRunner, step: int) -> list[PrefillChunk]:
    """Of one prompt of random tokens in shuffled blocks; only the last one's logits are wanted."""
    table = torch.randperm(runner.cache.shape.num_blocks)[: -(-prompt_tokens // BLOCK)].tolist()
    ids = torch.randint(runner.model.config.vocab_size, (prompt_tokens,)).tolist()
    return [
        PrefillChunk(ids[start : start + step], start, table, needs_logits=start + step >= prompt_tokens)
        for start in range(0, prompt_tokens, step)
    ]


def runs_of(prompt_tokens: int, runner: TritonRunner, chunk: int) -> dict[str, Callable[[], object]]:
    def run(chunks: list[PrefillChunk]) -> Callable[[], object]:
        return lambda: [runner.prefill([part]) for part in chunks]

    runs = {"whole": run(chunks_of(prompt_tokens, runner, prompt_tokens))}
    if prompt_tokens > chunk:
        runs["chunked"] = run(chunks_of(prompt_tokens, runner, chunk))
    return runs


def measure(prompt_tokens: int, runner: TritonRunner, ceiling: float, timer: Timer) -> list[list[str]]:
    runs = runs_of(prompt_tokens, runner, 24 if timer.is_dry else CHUNK)
    flops = Sizes(runner.model.config).prefill_flops(prompt_tokens)
    rows = []
    for name, taken in timer.replay(runs).items():
        seconds = taken.median
        spread = f"{taken.low * 1e3:.2f} to {taken.high * 1e3:.2f}"
        figures = [f"{prompt_tokens:,}", name, f"{flops / prompt_tokens / 1e9:.2f}", f"{seconds * 1e3:.2f}", spread]
        figures += [
            f"{prompt_tokens / seconds:,.0f}",
            f"{flops / seconds / 1e12:.0f}",
            f"{flops / seconds / ceiling:.1%}",
        ]
        rows.append([*figures, f"{GOAL[0]:.0%} to {GOAL[1]:.0%}" if prompt_tokens == 4096 else ""])
    return rows


@torch.inference_mode()
def main() -> int:
    made = parser(__doc__)
    made.add_argument("--prompts", type=int, nargs="+", default=[1024, 4096, 16384], metavar="TOKENS")
    args = made.parse_args()
    timer = open_timer(args)
    timer.repetitions = 10
    report = Report("Prefill at V2-Lite's shapes, random weights, bf16", args.out)
    ceilings = measure_ceilings(timer)
    report.say("", ceilings.line)
    config = published_config(MODEL, context_length=max(args.prompts))
    if timer.is_dry:
        args.prompts = [40]
        config = dry_config()
    runner = TritonRunner(*open_model_cache(config, 2 * -(-max(args.prompts) // BLOCK), timer.device), max_rows=1)
    rows = []
    for tokens in args.prompts:
        if timer.has_time:
            rows += measure(tokens, runner, ceilings.matmul_flops, timer)
        else:
            timer.remarks.append(f"{tokens} tokens: no time left")
    header = ("tokens", "steps", "GFLOP/token", "ms", "p10 to p90", "tok/s", "TFLOP/s", "MFU", "goal")
    report.table(header, rows)
    return report.finish(timer)


if __name__ == "__main__":
    raise SystemExit(main())
