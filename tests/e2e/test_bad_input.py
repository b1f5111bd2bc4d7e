"""Bad requests through the real port: a clear refusal that names the field, and other streams never notice."""

import asyncio
import math
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from isthmus.testing.stack import Result, Stack, StackClient, request
from isthmus.v1 import inference_pb2

VOCAB = 2048
CONTEXT = 2048
INVALID = grpc.StatusCode.INVALID_ARGUMENT


BYSTANDER = request("And it came to pass", max_tokens=80, temperature=0.8, seed=5, ignore_eos=True, logprobs=1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(stack: Stack) -> Result:
    async with StackClient(stack.router) as client:
        return await client.generate(BYSTANDER)


@pytest_asyncio.fixture(autouse=True)
async def bystander(client: StackClient, alone: Result) -> AsyncIterator[None]:
    """A stream that runs beside every bad request and must come out as it does alone."""
    running = asyncio.create_task(client.generate(BYSTANDER))
    await asyncio.sleep(0)
    yield
    beside = await running
    assert (beside.token_ids, beside.logprobs) == (alone.token_ids, alone.logprobs)


def details(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, list[str]]:
    """ErrorInfo and the names of the violated fields."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info, fields = error_details_pb2.ErrorInfo(), []
    for detail in status.details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            fields += [violation.field for violation in bad.field_violations]
    return info, fields


BAD = {
    "empty prompt": (request("", max_tokens=4), "prompt"),
    "no input": (inference_pb2.GenerateRequest(), "input"),
    "empty token ids": (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), "token_ids"),
    "empty chat": (inference_pb2.GenerateRequest(chat=inference_pb2.Chat()), "chat"),
    "unknown role": (request([("wizard", "hello")], max_tokens=4), "chat"),
    "negative token id": (request([5, -1], max_tokens=4), "token_ids"),
    "token id past the vocabulary": (request([5, VOCAB], max_tokens=4), "token_ids"),
    "token id past 32 bits": (request([5, 2**40], max_tokens=4), "token_ids"),
    "over the context": (request([5] * (CONTEXT - 10), max_tokens=11), "sampling.max_tokens"),
    "prompt over the context": (request([5] * (CONTEXT + 1)), "token_ids"),
    "10 MB prompt": (request("whale " * (10 * 2**20 // 6), max_tokens=4), "prompt"),
    "temperature NaN": (request("a", temperature=math.nan), "sampling.temperature"),
    "temperature infinite": (request("a", temperature=math.inf), "sampling.temperature"),
    "temperature negative": (request("a", temperature=-0.5), "sampling.temperature"),
    "top_p 0": (request("a", top_p=0.0), "sampling.top_p"),
    "top_p 2": (request("a", top_p=2.0), "sampling.top_p"),
    "top_k -2": (request("a", top_k=-2), "sampling.top_k"),
    "min_p 1": (request("a", min_p=1.0), "sampling.min_p"),
    "max_tokens 0": (request("a", max_tokens=0), "sampling.max_tokens"),
    "max_tokens negative": (request("a", max_tokens=-5), "sampling.max_tokens"),
    "min over max": (request("a", max_tokens=4, min_tokens=5), "sampling.min_tokens"),
    "10^5 stop strings": (request("a", stop=["x"] * 100_000), "sampling.stop"),
    "stop string of 1 MB": (request("a", stop=["x" * 2**20]), "sampling.stop"),
    "empty stop string": (request("a", stop=[""]), "sampling.stop"),
    "stop id past the vocabulary": (request("a", stop_token_ids=[VOCAB]), "sampling.stop_token_ids"),
    "logit_bias of 10^6": (request("a", logit_bias={i: 0.5 for i in range(1_000_000)}), "sampling.logit_bias"),
    "logit_bias bad id": (request("a", logit_bias={-1: 1.0}), "sampling.logit_bias"),
    "logit_bias NaN": (request("a", logit_bias={1: math.nan}), "sampling.logit_bias"),
    "logprobs 10^6": (request("a", logprobs=1_000_000), "sampling.logprobs"),
    "presence penalty NaN": (request("a", presence_penalty=math.nan), "sampling.presence_penalty"),
    "repetition penalty 0": (request("a", repetition_penalty=0.0), "sampling.repetition_penalty"),
}


@pytest.mark.parametrize("name", BAD)
async def test_refused_naming_the_field(client: StackClient, name: str) -> None:
    message, field = BAD[name]
    result = await client.failing(message)
    assert result.accepted is None
    assert result.error.code() == INVALID, result.error
    info, fields = details(result.error)
    assert info.reason == "INVALID_REQUEST"
    assert any(violated.startswith(field) for violated in fields), (field, fields)
    assert "allowed" in result.error.details()
    assert len(result.error.details()) < 1000


async def test_both_inputs_on_the_wire_are_refused(client: StackClient) -> None:
    """A client library cannot send two members of a oneof; raw bytes can, and parsing would keep the last."""
    both = request("Hello", max_tokens=3).SerializeToString() + request([5, 6]).SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in client.raw_generate(both):
            pass
    assert caught.value.code() == INVALID
    assert details(caught.value)[1] == ["input"]


async def test_deadline_already_past(client: StackClient) -> None:
    result = await client.failing(request("a", max_tokens=4), timeout_s=0.0)
    assert result.error.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_deadline_in_the_middle_ends_the_stream(client: StackClient) -> None:
    result = await client.failing(request("And", max_tokens=2000, ignore_eos=True), timeout_s=0.5)
    assert result.error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert result.token_ids


async def test_unknown_model(client: StackClient) -> None:
    message = request("a", max_tokens=4)
    message.model = "gpt-7"
    result = await client.failing(message)
    assert result.error.code() == grpc.StatusCode.NOT_FOUND
    assert details(result.error)[0].reason == "MODEL_NOT_FOUND"


async def test_special_tokens_in_user_text_stay_text(client: StackClient) -> None:
    response = await client.stub.Tokenize(inference_pb2.TokenizeRequest(prompt="a<|eos|>b"), timeout=5)
    assert 1 not in list(response.token_ids)
    text = await client.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=list(response.token_ids)), timeout=5)
    assert "a<|eos|>b" in text.text
