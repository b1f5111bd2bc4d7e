"""A worker or a connection fails at a chosen place, on real processes: raw clients, no library, get the same bits."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import grpc.aio
import pytest

from isthmus.cli.stack_plan import Ports
from isthmus.testing.processes import Worker, added_worker, until_known
from isthmus.testing.relay import relayed_port
from isthmus.testing.stack import Result, Stack, StackClient, ledger, request, running_stack, status, until
from isthmus.v1 import admin_pb2, admin_pb2_grpc, inference_pb2

NUM_STREAMS = 8
FROZEN_WITHIN_S = 20.0  # 3 s to notice, a replay of eight streams, and room for a busy machine


def asked(max_tokens: int) -> list[inference_pb2.GenerateRequest]:
    """Greedy and seeded; prompts of about 100 tokens that share nothing, so that each is computed and sent."""
    prompts = [[10 + (97 * number + 13 * position) % 2000 for position in range(100)] for number in range(NUM_STREAMS)]
    return [
        request(prompt, max_tokens=max_tokens, ignore_eos=True, logprobs=2, seed=number, temperature=float(number % 2))
        for number, prompt in enumerate(prompts)
    ]


def bits(results: list[Result]) -> list[tuple[object, ...]]:
    return [(tuple(result.token_ids), tuple(result.logprobs), result.finish_reason) for result in results]


async def streamed(stack: Stack, max_tokens: int) -> list[Result]:
    async with StackClient(stack.router) as client:
        return list(await asyncio.gather(*(client.generate(message) for message in asked(max_tokens))))


async def undisturbed(max_tokens: int) -> list[tuple[object, ...]]:
    """From a stack of its own, so that no cache of the disturbed one helps."""
    with running_stack() as stack:
        return bits(await streamed(stack, max_tokens))


@asynccontextmanager
async def joined(stack: Stack, role: str, *flags: str, host: str = "127.0.0.1") -> AsyncIterator[Worker]:
    with added_worker(stack, role, f"{role}-bad", *flags, host=host) as worker:
        await until_known(stack, worker)
        yield worker


async def has_streams(worker: Worker) -> bool:
    return (await status(worker.grpc)).num_streams > 0


async def is_empty(worker: Worker) -> bool:
    seen = await status(worker.grpc)
    return seen.num_streams == 0 and seen.blocks.referenced == 0


async def test_a_prefill_worker_that_dies_between_two_layers_is_replaced() -> None:
    expected = await undisturbed(20)
    with running_stack() as stack:
        async with joined(stack, "prefill", "--failpoints", "prefill.layer=kill@3") as bad:
            results = await streamed(stack, 20)
            assert bad.process.wait(10) == -signal.SIGKILL
        events = {event.event for event in await ledger(stack.router)}
    assert bits(results) == expected
    assert "request.rearmed" in events


@pytest.mark.timeout(180)
async def test_frames_that_are_damaged_lost_repeated_and_reordered_change_no_bit() -> None:
    fills = "transfer.fill=corrupt@every(5);transfer.fill=drop@13"
    harm = f"{fills};transfer.commit=duplicate@every(2);transfer.ack=reorder@every(3)"
    expected = await undisturbed(20)
    with running_stack() as stack:
        async with joined(stack, "prefill", "--failpoints", harm):
            results = await streamed(stack, 20)
        counters = (await status(stack.services("decode")[0]["grpc"])).counters
    assert bits(results) == expected
    assert counters["refused.bad_checksum"] > 0


async def test_a_decode_worker_that_dies_while_a_stream_moves_is_replaced() -> None:
    expected = await undisturbed(300)
    with running_stack() as stack:
        async with joined(stack, "decode", "--failpoints", "decode.move_frozen=kill@1") as bad:
            running = asyncio.create_task(streamed(stack, 300))
            await until(lambda: has_streams(bad), 20, "streams on the worker that is to die")
            async with grpc.aio.insecure_channel(bad.grpc) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await admin_pb2_grpc.AdminServiceStub(channel).Drain(admin_pb2.DrainRequest(timeout_ms=20_000))
            assert bad.process.wait(10) == -signal.SIGKILL
            assert bits(await running) == expected


async def test_a_decode_worker_no_router_reaches_any_more_is_replaced_and_drops_its_streams() -> None:
    """Only the path to the router stands still: prefill still reaches the worker, which goes on decoding."""
    expected = await undisturbed(400)
    here, told = "127.0.0.2", "127.0.0.3"  # where it listens; where it says that it does
    ports = Ports()
    grpc_port, zmq_port = ports.take(), ports.take()
    flags = ["--grpc-port", str(grpc_port), "--zmq-port", str(zmq_port), "--advertise-host", told]
    with running_stack() as stack:
        async with AsyncExitStack() as held:
            relay, _ = await held.enter_async_context(
                relayed_port(grpc_port, far_host=here, host=told, listen=grpc_port)
            )
            await held.enter_async_context(relayed_port(zmq_port, far_host=here, host=told, listen=zmq_port))
            with added_worker(stack, "decode", "decode-cut", *flags, host=here) as started:
                cut = Worker(started.name, started.role, f"{here}:{grpc_port}", started.process)
                await until_known(stack, cut)
                running = asyncio.create_task(streamed(stack, 400))
                await until(lambda: has_streams(cut), 20, "streams on the worker that is to be cut off")
                relay.freeze()
                async with asyncio.timeout(FROZEN_WITHIN_S):
                    results = await running
                relay.thaw()
                await until(lambda: is_empty(cut), 10, "the worker has dropped what went on elsewhere")
    ports.close()
    assert bits(results) == expected
