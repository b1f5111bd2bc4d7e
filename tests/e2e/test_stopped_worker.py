"""A decode worker that is frozen, not dead: its connection stays open and only its silence tells."""

import asyncio
import itertools
import os
import signal

import grpc.aio

from isthmus.testing.stack import Result, Stack, StackClient, request, running_stack, status, until

GOES_ON_WITHIN_S = 6.0  # 3 s without progress, then prefill and replay on a busy machine
MESSAGE = request("Once upon a time", max_tokens=400, temperature=0.8, seed=5, ignore_eos=True, logprobs=2)


async def busy_decode(stack: Stack) -> int:
    """The process that decodes now."""
    seen = await asyncio.gather(*(status(entry["grpc"]) for entry in stack.services("decode")))
    (busy,) = (one for one in seen if one.num_streams)
    return busy.pid


async def frozen_mid_stream(client: StackClient, stack: Stack) -> tuple[Result, int]:
    """What a stream said whose decode worker froze after some tokens, and which process that was."""
    result, frozen = Result(), 0
    async for response in client.stream(MESSAGE):
        result.take(response)
        if not frozen and len(result.token_ids) >= 20:
            frozen = await busy_decode(stack)
            os.kill(frozen, signal.SIGSTOP)
    return result, frozen


async def is_free(stack: Stack) -> bool:
    try:
        seen = [await status(entry["grpc"]) for entry in stack.services("decode")]
    except grpc.aio.AioRpcError:
        return False
    return all(one.num_streams == 0 and one.blocks.referenced == 0 and one.serving for one in seen)


def content(result: Result) -> tuple[object, ...]:
    return result.token_ids, result.logprobs, result.text, result.finish_reason


def test_a_stream_goes_on_when_its_decode_worker_freezes_and_the_woken_one_drops_it() -> None:
    async def check(stack: Stack) -> None:
        async with StackClient(stack.router) as client:
            quiet = await client.generate(MESSAGE)
            result, frozen = await frozen_mid_stream(client, stack)
            try:
                assert content(result) == content(quiet)
                silence_s = max(after - before for before, after in itertools.pairwise(result.arrival_s))
                assert silence_s < GOES_ON_WITHIN_S
            finally:
                os.kill(frozen, signal.SIGCONT)
            await until(lambda: is_free(stack), 10, "the woken worker holds nothing and serves")
            for _ in range(4):  # both workers are asked
                assert content(await client.generate(MESSAGE)) == content(quiet)

    with running_stack("--decode", "2") as stack:
        asyncio.run(check(stack))
