"""A decode worker that is frozen, not dead: its connection stays open and only its silence tells."""

import asyncio
import os
import signal
import time

import grpc
import grpc.aio

from isthmus.testing.stack import Client, Result, Stack, request, running_stack, status, until

LOST_WITHIN_S = 5.0  # keepalive's 3 s, and room for a busy machine


async def frozen_mid_stream(client: Client, pid: int) -> tuple[Result, float]:
    """What a stream said whose decode worker freezes after some tokens, and how long its end took."""
    result, frozen_at = Result(), time.monotonic()
    try:
        async for response in client.stream(request("Once upon a time", max_tokens=1500, ignore_eos=True)):
            result.take(response)
            if len(result.token_ids) == 5:
                os.kill(pid, signal.SIGSTOP)
                frozen_at = time.monotonic()
    except grpc.aio.AioRpcError as error:
        result.error = error
    return result, time.monotonic() - frozen_at


async def serves_again(client: Client, stack: Stack) -> None:
    async def is_free() -> bool:
        seen = await status(stack.services("decode")[0]["grpc"])
        return seen.num_streams == 0 and seen.blocks.referenced == 0

    async def generates() -> bool:
        return (await client.failing_or_not(request("And", max_tokens=3))).finished is not None

    await until(is_free, 5, "the frozen worker's blocks are free")
    await until(generates, 10, "served again")


def test_a_frozen_decode_worker_ends_its_streams_and_comes_back() -> None:
    async def check(stack: Stack) -> None:
        pid = stack.services("decode")[0]["pid"]
        async with Client(stack.router) as client:
            try:
                result, took_s = await frozen_mid_stream(client, pid)
            finally:
                os.kill(pid, signal.SIGCONT)
            assert result.error is not None
            assert result.error.code() is grpc.StatusCode.UNAVAILABLE
            assert took_s < LOST_WITHIN_S
            await serves_again(client, stack)

    with running_stack() as stack:
        asyncio.run(check(stack))
