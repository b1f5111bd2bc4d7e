"""`isthmus generate` against a router made of one servicer."""

import asyncio
import contextlib
import json
import signal
import struct
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import pytest

from isthmus.cli import main
from isthmus.errors import InvalidRequest
from isthmus.process.rpc import bind_grpc, create_server
from isthmus.v1 import inference_pb2, inference_pb2_grpc, types_pb2

LOGPROB = struct.unpack("<f", struct.pack("<f", -0.31))[0]


class Router(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, *, loses: int | None = None, hangs: bool = False) -> None:
        self.loses = loses  # the stream, after so many tokens
        self.hangs = hangs  # after the first token
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.resumes: list[tuple[str, int]] = []
        self.cancelled: list[str] = []

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        if request.sampling.top_p > 1:
            raise InvalidRequest.of("sampling.top_p", request.sampling.top_p, "(0, 1]")
        async for response in self.stream(0, context):
            yield response

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.ResumeResponse]:  # noqa: N802
        self.resumes.append((request.request_id, request.next_index))
        async for response in self.stream(request.next_index, context):
            yield inference_pb2.ResumeResponse.FromString(response.SerializeToString())

    async def Cancel(self, request: Any, context: Any) -> inference_pb2.CancelResponse:  # noqa: N802
        self.cancelled.append(request.request_id)
        return inference_pb2.CancelResponse(found=True)

    async def stream(self, start: int, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield inference_pb2.GenerateResponse(accepted=inference_pb2.Accepted(request_id="r-1"))
        for index, text in list(enumerate(["Hel", "lo"]))[start:]:
            if index == self.loses:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
            if index == 1 and self.hangs:
                await asyncio.Event().wait()
            top = [types_pb2.TopLogprob(id=5, logprob=LOGPROB)]
            token = types_pb2.Token(id=index + 5, logprob=LOGPROB, top_logprobs=top)
            yield inference_pb2.GenerateResponse(
                tokens=inference_pb2.TokenChunk(index=index, tokens=[token], text=text)
            )
        yield inference_pb2.GenerateResponse(
            finished=inference_pb2.Finished(
                finish_reason=types_pb2.FINISH_REASON_STOP,
                usage=inference_pb2.Usage(num_prompt_tokens=3, num_generated_tokens=2),
                timings=inference_pb2.Timings(ttft_ms=1.5, transfer_bytes=1 << 40),
                workers=inference_pb2.ServedBy(router="router-0", prefill="prefill-0", decode="decode-0"),
                text="!",
            )
        )


@contextlib.asynccontextmanager
async def router(servicer: Router) -> AsyncGenerator[str]:
    server = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = bind_grpc(server, "127.0.0.1", 0)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def generate(servicer: Router, *flags: str) -> int:
    async with router(servicer) as address:
        return await asyncio.to_thread(main, ["generate", "Hi", "--router", address, *flags])


async def test_text_is_streamed_and_ends_with_a_newline(capsys: pytest.CaptureFixture[str]):
    servicer = Router()
    assert await generate(servicer, "--chat", "--max-tokens", "7", "--stop", "x", "--stop", "y", "--seed", "3") == 0
    assert capsys.readouterr().out == "Hello!\n"
    asked = servicer.requests[0]
    assert asked.chat.messages[0].content == "Hi"
    assert (asked.sampling.max_tokens, list(asked.sampling.stop), asked.sampling.seed) == (7, ["x", "y"], 3)
    assert not asked.sampling.HasField("temperature")


async def test_json_is_one_object_with_exact_floats(capsys: pytest.CaptureFixture[str]):
    assert await generate(Router(), "--json", "--logprobs", "1", "--seed", str(2**64 - 1)) == 0
    shown = json.loads(capsys.readouterr().out)
    keys = "request_id seed text token_ids logprobs finish_reason usage timings workers"
    assert list(shown) == [*keys.split(), "num_attempts", "num_resumes", "request_ids"]
    assert (shown["request_id"], shown["seed"], shown["text"]) == ("r-1", 2**64 - 1, "Hello!")
    assert (shown["token_ids"], shown["finish_reason"]) == ([5, 6], "stop")
    assert shown["logprobs"][0] == {"logprob": LOGPROB, "top": [{"id": 5, "logprob": LOGPROB}]}
    assert shown["usage"] == {"num_prompt_tokens": 3, "num_cached_tokens": 0, "num_generated_tokens": 2}
    assert shown["timings"]["transfer_bytes"] == 1 << 40
    assert shown["workers"]["decode"] == "decode-0"


async def test_refusal_is_one_line_with_reason_and_field(capsys: pytest.CaptureFixture[str]):
    assert await generate(Router(), "--top-p", "2") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "isthmus generate: INVALID_REQUEST (sampling.top_p): sampling.top_p: given 2.0; allowed: (0, 1]\n"
    )


async def test_value_the_message_cannot_hold_is_refused_here(capsys: pytest.CaptureFixture[str]):
    assert await generate(Router(), "--seed", "-1") == 1
    assert "INVALID_REQUEST" in capsys.readouterr().err


def test_absent_router_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "Hi", "--router", "127.0.0.1:1"]) == 1
    assert "no router answers at 127.0.0.1:1" in capsys.readouterr().err


async def test_a_router_lost_on_the_way_is_not_seen(capsys: pytest.CaptureFixture[str]):
    first = Router(loses=1)
    second = Router()
    async with router(first) as here, router(second) as there:
        assert await asyncio.to_thread(main, ["generate", "Hi", "--router", f"{here},{there}", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["text"], shown["token_ids"], shown["num_resumes"]) == ("Hello!", [5, 6], 1)
    assert shown["seed"] == first.requests[0].sampling.seed
    assert second.resumes == [("r-1", 1)]


async def test_ctrl_c_cancels_the_request():
    servicer = Router(hangs=True)
    async with router(servicer) as address:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "isthmus.cli", "generate", "Hi", "--router", address),
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readexactly(3) == b"Hel"
        process.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 10) == 130
    assert servicer.cancelled == ["r-1"]


def test_bundled_model_has_a_path(capsys: pytest.CaptureFixture[str]):
    assert main(["model", "path", "bundled"]) == 0
    assert capsys.readouterr().out.strip().endswith("isthmus/bundled")
