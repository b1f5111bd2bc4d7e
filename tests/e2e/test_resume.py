"""Resume, retention and continuation from emitted tokens, on a real stack: the bits of the undisturbed stream."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import redis

from isthmus.process.rpc_errors import error_from_rpc
from isthmus.testing.stack import Result, Stack, StackClient, request, running_stack, status, until
from isthmus.v1 import inference_pb2, types_pb2

SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7, "repetition_penalty": 1.1, "presence_penalty": 0.4},
}


@pytest.fixture(scope="module")
def routers() -> Iterator[Stack]:
    with running_stack("--routers", "2", "--decode", "2") as stack:
        yield stack


@pytest_asyncio.fixture
async def clients(routers: Stack) -> AsyncIterator[tuple[StackClient, StackClient]]:
    first, second = (router["grpc"] for router in routers.services("routers"))
    async with StackClient(first) as one, StackClient(second) as other:
        yield one, other


def ask(kind: str, *, max_tokens: int = 120, kept: bool = True) -> inference_pb2.GenerateRequest:
    message = request("Once upon a time", max_tokens=max_tokens, ignore_eos=True, logprobs=3, **SAMPLINGS[kind])
    if kept:
        message.on_disconnect, message.retention_s = types_pb2.ON_DISCONNECT_RETAIN, 20
    return message


async def begin(client: StackClient, message: inference_pb2.GenerateRequest, num_tokens: int) -> Result:
    """Leaves the stream after `num_tokens`, as a client that dies."""
    result, call = Result(), client.stub.Generate(message, timeout=60)
    while len(result.token_ids) < num_tokens:
        result.take(await call.read())
    call.cancel()
    return result


async def resume(client: StackClient, request_id: str, next_index: int) -> Result:
    """What comes from `next_index` on."""
    result = Result()
    message = inference_pb2.ResumeRequest(request_id=request_id, next_index=next_index)
    result.token_ids, result.logprobs = [0] * next_index, [(0.0, ())] * next_index
    async for response in client.stub.Resume(message, timeout=60):
        if response.WhichOneof("event") == "accepted":
            result.accepted = response.accepted
        else:
            kind = response.WhichOneof("event")
            result.take(inference_pb2.GenerateResponse(**{kind: getattr(response, kind)}))
    return result


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def same_from(index: int, result: Result, whole: Result) -> None:
    assert result.token_ids[index:] == whole.token_ids[index:]
    assert result.logprobs[index:] == whole.logprobs[index:]
    assert whole.text.endswith(result.text)
    assert result.finish_reason == whole.finish_reason
    assert result.finished is not None
    assert result.finished.usage.num_generated_tokens == len(whole.token_ids)


@pytest.mark.parametrize("kind", SAMPLINGS)
async def test_a_stream_left_by_its_client_is_resumed_at_another_router(
    clients: tuple[StackClient, StackClient], kind: str
) -> None:
    whole = await clients[0].generate(ask(kind, kept=False))
    left = await begin(clients[0], ask(kind), 10)
    assert left.accepted is not None

    same_from(10, await resume(clients[1], left.accepted.request_id, 10), whole)


async def test_a_finished_stream_is_replayed_from_any_index_until_it_is_cancelled(
    clients: tuple[StackClient, StackClient],
) -> None:
    whole = await clients[0].generate(ask("seeded"))
    assert whole.accepted is not None
    request_id = whole.accepted.request_id

    for index in (0, 119, 120, 60):
        same_from(index, await resume(clients[index % 2], request_id, index), whole)

    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await resume(clients[1], request_id, 121)
    assert refusal.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert (await clients[1].stub.Cancel(inference_pb2.CancelRequest(request_id=request_id))).found
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await resume(clients[0], request_id, 0)
    assert error_from_rpc(refusal.value).reason == "STREAM_GONE"


async def test_resume_needs_no_redis(routers: Stack, clients: tuple[StackClient, StackClient]) -> None:
    whole = await clients[0].generate(ask("greedy", kept=False))
    left = await begin(clients[0], ask("greedy"), 5)
    assert left.accepted is not None
    redis.Redis.from_url(routers.redis_url).flushall()

    same_from(3, await resume(clients[1], left.accepted.request_id, 3), whole)


async def test_the_later_of_two_resumes_has_the_stream(clients: tuple[StackClient, StackClient]) -> None:
    whole = await clients[0].generate(ask("greedy", max_tokens=600, kept=False))
    left = await begin(clients[0], ask("greedy", max_tokens=600), 5)
    assert left.accepted is not None
    message = inference_pb2.ResumeRequest(request_id=left.accepted.request_id, next_index=5)
    earlier = clients[0].stub.Resume(message, timeout=60)
    while (await earlier.read()).WhichOneof("event") != "tokens":
        pass

    same_from(5, await resume(clients[1], left.accepted.request_id, 5), whole)

    with pytest.raises(grpc.aio.AioRpcError) as told:
        await read_to_the_end(earlier)
    assert told.value.code() is grpc.StatusCode.ABORTED
    assert error_from_rpc(told.value).reason == "ATTACHED_ELSEWHERE"


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("num_emitted", [1, 64, 119, 120])
async def test_continued_from_its_tokens_the_stream_has_the_same_bits(
    clients: tuple[StackClient, StackClient], kind: str, num_emitted: int
) -> None:
    whole = await clients[0].generate(ask(kind, kept=False))
    message = ask(kind, kept=False)
    message.sampling.seed = 7
    message.emitted_token_ids.extend(whole.token_ids[:num_emitted])
    result = Result(token_ids=[0] * num_emitted, logprobs=[(0.0, ())] * num_emitted)

    async for response in clients[1].stream(message):
        if response.WhichOneof("event") != "accepted":
            result.accepted = result.accepted or inference_pb2.Accepted()
            result.take(response)

    same_from(num_emitted, result, whole)


async def test_tokens_the_model_did_not_emit_are_data_loss(clients: tuple[StackClient, StackClient]) -> None:
    message = ask("greedy", kept=False)
    message.emitted_token_ids.extend([5, 6, 7, 8])
    assert (await clients[0].failing(message)).error.code() is grpc.StatusCode.DATA_LOSS


async def test_nobody_comes_back_and_nothing_is_left(routers: Stack, clients: tuple[StackClient, StackClient]) -> None:
    message = ask("greedy", max_tokens=1800)
    message.retention_s = 1
    await begin(clients[0], message, 5)

    async def is_free() -> bool:
        seen = await asyncio.gather(*(status(worker["grpc"]) for worker in routers.services("decode")))
        return all(worker.num_streams == 0 and worker.blocks.referenced == 0 for worker in seen)

    await until(is_free, 6, "its blocks are free")


async def test_a_killed_router_loses_no_stream() -> None:
    with running_stack("--routers", "2") as stack:
        first, second = stack.services("routers")
        async with StackClient(first["grpc"]) as one, StackClient(second["grpc"]) as other:
            whole = await one.generate(ask("seeded", max_tokens=400, kept=False))
            result, call = Result(), one.stub.Generate(ask("seeded", max_tokens=400), timeout=60)
            while len(result.token_ids) < 20:
                result.take(await call.read())
            os.kill(first["pid"], signal.SIGKILL)
            assert result.accepted is not None

            same_from(20, await resume(other, result.accepted.request_id, 20), whole)
