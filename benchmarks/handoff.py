"""What a hand-off costs: from token 0 at prefill to token 1 at the client, less one decode step and the raw bytes.

    python -m benchmarks.handoff [--requests 40] [--prompt-tokens 128]

Both ends read the same machine's monotonic clock. The raw transfer is the request's bytes at RAW_BYTES_PER_S, a slow
reading of what `python -m benchmarks.transfer` shows for bare pyzmq, so little is subtracted.
"""

import argparse
import asyncio
import statistics

from benchmarks.machine import describe, quantile
from isthmus.testing.stack import Stack, StackClient, ledger, request, running_stack

RAW_BYTES_PER_S = 4e9


async def measure(stack: Stack, num_requests: int, num_prompt_tokens: int) -> list[float]:
    """Overheads in milliseconds, one request at a time."""
    (prefill,) = stack.services("prefill")
    overheads = []
    async with StackClient(stack.router) as client:
        for number in range(num_requests + 3):
            prompt = [10 + (number * 31 + position) % 2000 for position in range(num_prompt_tokens)]
            result = await client.generate(request(prompt, max_tokens=32, temperature=0.0, ignore_eos=True))
            events = await ledger(prefill["grpc"], result.accepted.request_id)
            sampled_ns = next(event.monotonic_ns for event in events if event.event == "prefill.first_token")
            gaps = [after - before for before, after in zip(result.arrival_s[1:], result.arrival_s[2:], strict=False)]
            raw_s = result.finished.timings.transfer_bytes / RAW_BYTES_PER_S
            spent_s = result.arrival_s[1] - sampled_ns / 1e9
            overheads.append((spent_s - statistics.median(gaps) - raw_s) * 1e3)
    return overheads[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    args = parser.parse_args()
    with running_stack() as stack:
        overheads = asyncio.run(measure(stack, args.requests, args.prompt_tokens))
    print(f"handoff, 1P1D, {args.prompt_tokens} prompt tokens, {len(overheads)} requests; {describe()}")
    print(f"p50 {quantile(overheads, 0.5):.2f} ms   p99 {quantile(overheads, 0.99):.2f} ms   (goal: p50 <= 20 ms)")


if __name__ == "__main__":
    main()
