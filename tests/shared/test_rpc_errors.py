"""Errors cross gRPC as status and details and come back as the same class, for every kind of call."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from typing import Any

import grpc
import grpc.aio
import pytest

from isthmus import errors
from isthmus.errors import FieldViolation, InvalidRequest, IsthmusError, Overloaded
from isthmus.process.rpc import PUBLIC_RECEIVE_BYTES, bind_grpc, channel, create_server
from isthmus.process.rpc_errors import error_from_rpc, error_from_status, status_of, typed_error
from isthmus.v1 import decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, error: Exception | None):
        self.error = error
        self.cancelled = asyncio.Event()
        self.hold = False

    async def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:  # noqa: N802
        if self.error:
            raise self.error
        return inference_pb2.TokenizeResponse(token_ids=[len(request.prompt)])

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:  # noqa: N802
        yield inference_pb2.GenerateResponse(tokens=inference_pb2.TokenChunk(text="a"))
        if self.hold:
            try:
                await asyncio.sleep(30)
            finally:
                self.cancelled.set()
        if self.error:
            raise self.error

    async def Resume(self, request: Any, context: Any) -> None:  # noqa: N802
        await context.write(inference_pb2.ResumeResponse(tokens=inference_pb2.TokenChunk(text="w")))
        if self.error:
            raise self.error


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    async def Session(self, requests: Any, context: Any) -> AsyncIterator[decode_pb2.SessionResponse]:  # noqa: N802
        async for _ in requests:
            yield decode_pb2.SessionResponse()
        raise errors.StaleOwner("attach counter 1 < 2")


@contextlib.asynccontextmanager
async def serving(servicer: Inference) -> AsyncGenerator[grpc.aio.Channel]:
    server = create_server(max_receive_bytes=PUBLIC_RECEIVE_BYTES)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(Decode(), server)
    port = bind_grpc(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with channel(f"127.0.0.1:{port}") as opened:
            yield opened
    finally:
        await server.stop(0)


@contextlib.contextmanager
def typed_errors() -> Generator[None]:
    """Calls made inside raise what `error_from_rpc` makes of their failure."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def test_unary_error_keeps_class_field_and_retry_delay():
    violation = FieldViolation("sampling.top_p", "given 2.0; allowed: (0, 1]")
    async with serving(Inference(Overloaded("queue full", retry_after_s=0.25, violations=(violation,)))) as opened:
        stub = inference_pb2_grpc.InferenceServiceStub(opened)
        with pytest.raises(Overloaded) as caught, typed_errors():
            await stub.Tokenize(inference_pb2.TokenizeRequest(), timeout=2)
    assert (caught.value.detail, caught.value.retry_after_s, caught.value.violations) == (
        "queue full",
        0.25,
        (violation,),
    )


@pytest.mark.parametrize("method", ["Generate", "Resume"])
async def test_stream_delivers_what_came_before_the_error(method: str):
    async with serving(Inference(InvalidRequest.of("prompt", "", "text"))) as opened:
        request = inference_pb2.GenerateRequest() if method == "Generate" else inference_pb2.ResumeRequest()
        call = getattr(inference_pb2_grpc.InferenceServiceStub(opened), method)(request, timeout=2)
        texts: list[str] = []
        with pytest.raises(InvalidRequest), typed_errors():  # noqa: PT012 - the stream delivers, then raises
            async for response in call:
                texts.append(response.tokens.text)
    assert len(texts) == 1


async def test_bidirectional_stream_is_mapped():
    async with serving(Inference(None)) as opened:
        call = decode_pb2_grpc.DecodeServiceStub(opened).Session(timeout=2)
        await call.write(decode_pb2.SessionRequest())
        await call.read()
        await call.done_writing()
        with pytest.raises(errors.StaleOwner), typed_errors():
            await call.read()


@pytest.mark.parametrize("method", ["Tokenize", "Generate"])
async def test_unexpected_error_shows_only_an_id(method: str, caplog: pytest.LogCaptureFixture):
    secret = "/srv/model at 0x7f00 token=hunter2"
    async with serving(Inference(ValueError(secret))) as opened:
        stub = inference_pb2_grpc.InferenceServiceStub(opened)
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # noqa: PT012 - one of two calls
            if method == "Tokenize":
                await stub.Tokenize(inference_pb2.TokenizeRequest(), timeout=2)
            else:
                async for _ in stub.Generate(inference_pb2.GenerateRequest(), timeout=2):
                    pass
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert (caught.value.details() or "").startswith("internal error ")
    assert "hunter2" not in repr(caught.value)


async def test_client_that_goes_away_cancels_the_handler():
    servicer = Inference(None)
    servicer.hold = True
    async with serving(servicer) as opened:
        call = inference_pb2_grpc.InferenceServiceStub(opened).Generate(inference_pb2.GenerateRequest())
        await call.read()
        call.cancel()
        await asyncio.wait_for(servicer.cancelled.wait(), 2)


async def test_ten_megabyte_prompt_reaches_the_handler():
    async with serving(Inference(None)) as opened:
        request = inference_pb2.TokenizeRequest(prompt="x" * 10_000_000)
        answer = await inference_pb2_grpc.InferenceServiceStub(opened).Tokenize(request, timeout=5)
    assert answer.token_ids == [10_000_000]


async def test_dead_peer_becomes_a_lost_worker_without_its_address():
    async with channel("127.0.0.1:1") as opened:
        with pytest.raises(errors.WorkerLost) as caught, typed_errors():
            await inference_pb2_grpc.InferenceServiceStub(opened).Tokenize(inference_pb2.TokenizeRequest(), timeout=2)
    assert "127.0.0.1" not in caught.value.detail


def test_every_error_class_survives_the_round_trip():
    pending, seen = [IsthmusError], 0
    while pending:
        error_class = pending.pop()
        pending.extend(error_class.__subclasses__())
        error = typed_error(error_class.reason, "detail")
        assert type(error) is error_class
        assert type(error_from_status(status_of(error))) is error_class
        seen += 1
    assert seen > 15


def test_details_stay_within_the_metadata_bound():
    violations = tuple(FieldViolation(f"f{i}", "y" * 10_000) for i in range(1000))
    status = status_of(InvalidRequest("x" * 100_000, violations=violations))
    assert len(status.SerializeToString()) < 8192
