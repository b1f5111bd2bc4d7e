"""A real local stack for tests and benchmarks, and a client that records everything a stream said."""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil

from isthmus.config import worker_environment
from isthmus.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, types_pb2

READY_TIMEOUT_S = 90.0
POOLS = ("routers", "prefill", "decode", "redis")


class Stack:
    """A running `isthmus up --json`, as a user runs it."""

    def __init__(self, process: "subprocess.Popen[str]", ready: dict[str, Any]):
        self.process = process
        self.ready = ready

    @property
    def router(self) -> str:
        """The first router's address."""
        return self.routers[0]

    @property
    def routers(self) -> list[str]:
        return [entry["grpc"] for entry in self.ready["routers"]]

    @property
    def logs(self) -> Path:
        return Path(self.ready["logs"])

    @property
    def redis_url(self) -> str:
        return f"redis://{self.ready['redis'][0]['address']}"

    def services(self, role: str) -> list[dict[str, Any]]:
        return self.ready[role]

    def current(self) -> list[dict[str, Any]]:
        """Every process with its `pool` as the supervisor sees it now: pids change over restarts, addresses do not."""
        now = json.loads((self.logs.parent / "stack.json").read_text(encoding="utf-8"))
        return [{**entry, "pool": pool} for pool in POOLS for entry in now[pool]]

    def process_named(self, name: str) -> dict[str, Any]:
        return next(entry for entry in self.current() if entry["name"] == name)

    def send(self, name: str, number: signal.Signals) -> None:
        """Sends a signal to the process that has this name now; nothing happens while there is none."""
        pid = self.process_named(name)["pid"]
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def pids(self) -> list[int]:
        return [entry["pid"] for pool in POOLS for entry in self.ready[pool]]

    def stop(self, timeout_s: float = 10.0) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def running_stack(
    *flags: str, env: dict[str, str] | None = None, ready_timeout_s: float = READY_TIMEOUT_S
) -> Iterator[Stack]:
    """A stack for the block, with these flags of `isthmus up`; it is ended however the block ends."""
    process = start_supervisor("--ready-timeout", str(0.9 * ready_timeout_s), *flags, env=env)
    try:
        yield Stack(process, read_ready(process, ready_timeout_s))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        close(process)


def close(process: "subprocess.Popen[str]") -> None:
    """Reaps an ended supervisor and closes what it wrote to."""
    with process:
        process.wait(5)


def start_supervisor(*flags: str, env: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """`isthmus up --json` as a child, its output in pipes. `env`: variables besides those of every worker."""
    command = [sys.executable, "-m", "isthmus.cli", "up", "--json", *flags]
    merged = {**worker_environment(), **(env or {})}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=merged)


def read_ready(process: "subprocess.Popen[str]", timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
    """The ready object. Raises AssertionError with what the supervisor said when there is none in time."""
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], timeout_s)
    line = process.stdout.readline() if readable else ""
    if not line:
        process.kill()
        _, stderr = process.communicate(timeout=10)
        raise AssertionError(f"the stack did not become ready: {stderr[-4000:]}")
    return json.loads(line)


@dataclass
class Result:
    """Everything one stream said, in order."""

    accepted: inference_pb2.Accepted | None = None
    finished: inference_pb2.Finished | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    text: str = ""
    chunks: list[inference_pb2.TokenChunk] = field(default_factory=list)
    arrival_s: list[float] = field(default_factory=list)  # one per token
    error: grpc.aio.AioRpcError | None = None

    @property
    def finish_reason(self) -> str:
        assert self.finished is not None
        return types_pb2.FinishReason.Name(self.finished.finish_reason).removeprefix("FINISH_REASON_").lower()

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        """Adds a response. Raises AssertionError for one that no stream may hold at this point."""
        match response.WhichOneof("event"):
            case "accepted":
                assert self.accepted is None, "accepted twice"
                assert not self.token_ids, "accepted after a token"
                self.accepted = response.accepted
            case "tokens":
                chunk = response.tokens
                assert self.accepted is not None, "a token before accepted"
                assert chunk.index == len(self.token_ids), (
                    f"gap or repeat: {chunk.index} after {len(self.token_ids)} tokens"
                )
                self.chunks.append(chunk)
                self.text += chunk.text
                for token in chunk.tokens:
                    self.token_ids.append(token.id)
                    top = tuple((entry.id, entry.logprob) for entry in token.top_logprobs)
                    self.logprobs.append((token.logprob, top))
                    self.arrival_s.append(time.monotonic())
            case "finished":
                assert self.finished is None, "finished twice"
                self.finished = response.finished
                self.text += response.finished.text
            case _:
                raise AssertionError("an empty response")


class StackClient:
    """Talks to one router through its real port, without the client library. An async context manager."""

    def __init__(self, address: str):
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_send_message_length", 64 << 20)])
        self.stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> "StackClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    def raw_generate(self, raw: bytes) -> AsyncIterator[bytes]:
        """Bytes in, bytes out: what no client library would send."""
        call: Any = self._channel.unary_stream("/isthmus.v1.InferenceService/Generate")
        return aiter(call(raw, timeout=10))

    async def stream(
        self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 60.0
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        async for response in self.stub.Generate(request, timeout=timeout_s):
            yield response

    async def generate(self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 60.0) -> Result:
        """Reads a stream to its end. Raises AioRpcError."""
        result = Result()
        async for response in self.stream(request, timeout_s):
            result.take(response)
        assert result.finished is not None, "the stream ended without `finished`"
        return result

    async def failing_or_not(self, request: inference_pb2.GenerateRequest) -> Result:
        """As `generate`, for a request that may fail: then the result holds the error and nothing else."""
        try:
            return await self.generate(request)
        except grpc.aio.AioRpcError as error:
            return Result(error=error)

    async def failing(self, request: inference_pb2.GenerateRequest, timeout_s: float | None = 30.0) -> Result:
        """As `generate`, for a request that has to fail: the error is in the result. Raises AssertionError."""
        result = Result()
        try:
            async for response in self.stream(request, timeout_s):
                result.take(response)
        except grpc.aio.AioRpcError as error:
            result.error = error
        assert result.error is not None, f"the request did not fail: {result}"
        return result


def request(prompt: str | Sequence[int | tuple[str, str]], **sampling: Any) -> inference_pb2.GenerateRequest:
    """A request whose prompt is text, token ids, or (role, content) chat messages."""
    message = inference_pb2.GenerateRequest(sampling=types_pb2.SamplingParams(**sampling))
    if isinstance(prompt, str):
        message.prompt = prompt
        return message
    message.token_ids.ids.extend(item for item in prompt if isinstance(item, int))
    if chat := [item for item in prompt if isinstance(item, tuple)]:
        message.chat.messages.extend(inference_pb2.ChatMessage(role=role, content=content) for role, content in chat)
    return message


async def status(address: str, timeout_s: float = 5.0) -> admin_pb2.GetStatusResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        return await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout_s)


async def ledger(address: str, request_id: str = "") -> list[admin_pb2.LedgerEvent]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        response = await stub.Ledger(admin_pb2.LedgerRequest(request_id=request_id, limit=20_000), timeout=5)
        return list(response.events)


async def until(condition: Any, timeout_s: float, what: str | Callable[[], str]) -> None:
    """Waits until an async condition holds. Raises AssertionError naming `what`, as it is then, when time is over."""
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what if isinstance(what, str) else what()}"
        await asyncio.sleep(0.05)


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie does not."""
    return [pid for pid in pids if _is_alive(pid)]


def _is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
