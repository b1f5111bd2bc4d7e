"""What `isthmus demo` prints and checks, with a router made of one servicer."""

import argparse
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli import arguments, demo
from isthmus.errors import Overloaded
from isthmus.process.rpc import bind_grpc, create_server
from isthmus.v1 import inference_pb2, inference_pb2_grpc, types_pb2

GONE = 2**22 + 1  # above the kernel's largest pid


class Router(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self) -> None:
        self.chats: list[list[str]] = []

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:  # noqa: N802
        said = [message.content for message in request.chat.messages]
        self.chats.append(said)
        if "fox" in said[-1]:
            raise Overloaded("queue full")
        yield inference_pb2.GenerateResponse(
            tokens=inference_pb2.TokenChunk(tokens=[types_pb2.Token(id=9)], text=f"<{said[-1]}>")
        )
        usage = inference_pb2.Usage(num_prompt_tokens=40, num_cached_tokens=16, num_generated_tokens=1)
        timings = inference_pb2.Timings(transfer_bytes=2048, transfer_blocks=3, transfer_exposed_ms=0.25)
        workers = inference_pb2.ServedBy(prefill="prefill-0", decode="decode-0")
        finished = inference_pb2.Finished(
            finish_reason=types_pb2.FINISH_REASON_STOP, usage=usage, timings=timings, workers=workers
        )
        yield inference_pb2.GenerateResponse(finished=finished)


async def run_demo(monkeypatch: pytest.MonkeyPatch, servicer: Router, *, pid: int, state: Path) -> int:
    @contextlib.asynccontextmanager
    async def stack(flags: Sequence[str]) -> AsyncGenerator[dict[str, Any]]:
        server = create_server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
        address = f"127.0.0.1:{bind_grpc(server, '127.0.0.1', 0)}"
        await server.start()
        router = {"name": "router-0", "pid": pid, "grpc": address}
        ready = {
            "supervisor": GONE,
            "logs": str(state / "logs"),
            "routers": [router],
            "prefill": [],
            "decode": [],
            "redis": [],
        }
        try:
            yield ready
        finally:
            await server.stop(0)

    monkeypatch.setattr(demo, "temporary_stack", stack)
    parsed: argparse.Namespace = arguments.parse(["demo"])
    return await demo.run(parsed)


async def test_second_turn_carries_the_first_and_every_request_has_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    servicer = Router()
    monkeypatch.setattr(demo, "_ASKS", [ask for ask in demo._ASKS if "fox" not in ask.turns[0]])
    assert await run_demo(monkeypatch, servicer, pid=GONE, state=tmp_path / "gone") == 0
    out = capsys.readouterr().out
    assert [
        "You are a small and friendly assistant.",
        "My name is Anna.",
        "<My name is Anna.>",
        "What is my name?",
    ] in (servicer.chats)
    row = next(line for line in out.splitlines() if line.startswith("chat, turn 2") and "prefill-0" in line)
    assert row.split()[3:6] == ["40", "16", "1"]
    assert "2.0" in row
    assert "prefill-0 > decode-0" in row
    assert out.endswith("stopped; no process and no file left\n")


async def test_failed_request_and_what_is_left_behind_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert await run_demo(monkeypatch, Router(), pid=os.getpid(), state=tmp_path) == 1
    out = capsys.readouterr().out
    assert "OVERLOADED: queue full" in out
    assert f"left behind: process {os.getpid()}, {tmp_path}" in out
