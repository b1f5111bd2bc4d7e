"""Supervisor and processes: how they end, and what is left of them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc.aio
import pytest

from isthmus.testing.stack import (
    Result,
    Stack,
    StackClient,
    alive,
    close,
    read_ready,
    request,
    running_stack,
    start_supervisor,
    until,
)


def test_sigterm_ends_everything_within_5_s() -> None:
    with running_stack("--prefill", "2", "--decode", "2") as stack:
        pids = stack.pids()
        assert len(pids) == 6
        assert alive(pids) == pids
        began = time.monotonic()
        assert stack.stop() == 0
        assert time.monotonic() - began < 5.0
        assert alive(pids) == []


async def test_sigterm_under_load_ends_within_5_s() -> None:
    with running_stack() as stack:
        async with StackClient(stack.router) as client:
            message = request("And", max_tokens=2000, ignore_eos=True)
            streams = [asyncio.create_task(client.generate(message)) for _ in range(8)]
            await asyncio.sleep(0.5)
            began = time.monotonic()
            stack.process.send_signal(signal.SIGTERM)
            while stack.process.poll() is None:
                assert time.monotonic() - began < 5.0
                await asyncio.sleep(0.02)
            outcomes = await asyncio.gather(*streams, return_exceptions=True)
        assert alive(stack.pids()) == []
        for outcome in outcomes:
            assert isinstance(outcome, Result | grpc.aio.AioRpcError), "every stream finishes or ends with a status"


async def test_sigkill_of_the_supervisor_leaves_no_child() -> None:
    process = start_supervisor()
    stack = Stack(process, read_ready(process))
    process.kill()
    close(process)

    async def gone() -> bool:
        return not alive(stack.pids())

    await until(gone, 3, "children of a killed supervisor")


async def test_a_killed_worker_is_restarted_at_its_address() -> None:
    with running_stack() as stack, _client_loop(stack) as client:
        (decode,) = stack.services("decode")
        os.kill(decode["pid"], signal.SIGKILL)

        async def works_again() -> bool:
            try:
                result = await client.generate(request("Hello", max_tokens=5, ignore_eos=True), timeout_s=5)
            except grpc.aio.AioRpcError:
                return False
            return len(result.token_ids) == 5

        await until(works_again, 30, "the stack serves again after a decode worker was killed")
        shown = _status(stack)
        assert json.loads(shown)  # one JSON object
        assert decode["grpc"] in shown


class _client_loop:  # noqa: N801 - reads as a with-statement
    """A client that is closed in the test's loop."""

    def __init__(self, stack: Stack):
        self._client = StackClient(stack.router)

    def __enter__(self) -> StackClient:
        return self._client

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().create_task(self._client.__aexit__())


def _status(stack: Stack) -> str:
    command = [sys.executable, "-m", "isthmus.cli", "status", "--json", "--router", stack.router]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


def test_generate_starts_and_stops_its_own_stack(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "isthmus.cli", "generate", "What is 28 + 45?", "--max-tokens", "8", "--json"]
    done = subprocess.run(
        [*command, "--logprobs", "2", "--seed", "3"], capture_output=True, text=True, timeout=90, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) >= {
        "request_id",
        "seed",
        "text",
        "token_ids",
        "logprobs",
        "finish_reason",
        "usage",
        "timings",
        "workers",
    }
    assert answer["seed"] == 3
    assert len(answer["token_ids"]) == len(answer["logprobs"]) <= 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("service", ["router", "prefill_service", "decode_service"])
def test_a_taken_port_is_named(service: str, stack: Stack) -> None:
    taken = stack.router.rsplit(":", 1)[1]
    command = [sys.executable, "-m", service, "--grpc-port", taken, "--redis-url", stack.redis_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "grpc_port" in done.stderr or "grpc-port" in done.stderr
    assert taken in done.stderr


@pytest.mark.parametrize("service", ["router", "prefill_service", "decode_service"])
def test_redis_unreachable_at_start_is_named(service: str) -> None:
    command = [sys.executable, "-m", service, "--redis-url", "redis://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert "redis" in done.stderr.lower()
    assert "127.0.0.1:1" in done.stderr
