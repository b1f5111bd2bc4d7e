"""grpc.health.v1, reflection and GetStatus on every service, also while a step loop is busy or stalled."""

import asyncio
import os
import signal
import time

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from isthmus.testing.stack import Stack, StackClient, request, running_stack, status, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
FACES = {
    "routers": "isthmus.v1.InferenceService",
    "prefill": "isthmus.v1.PrefillService",
    "decode": "isthmus.v1.DecodeService",
}


async def check(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=1)).status


@pytest.mark.parametrize("role", FACES)
async def test_every_service_answers_health_reflection_and_status(stack: Stack, role: str) -> None:
    address = stack.services(role)[0]["grpc"]
    assert await check(address) == SERVING
    assert await check(address, FACES[role]) == SERVING
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await check(address, "no.such.Service")
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([ask]), timeout=5):
            names = {service.name for service in answer.list_services_response.service}
            break
    assert {FACES[role], "isthmus.v1.AdminService", "grpc.health.v1.Health"} <= names
    seen = await status(address)
    assert seen.serving
    assert seen.pid == stack.services(role)[0]["pid"]
    assert len(seen.incarnation) == 32
    if role != "routers":
        assert seen.blocks.total > 0
        assert seen.numerics_digest
        assert seen.layout.fingerprint
        assert seen.numerics_ingredients


async def test_watch_tells_of_a_stall_and_of_its_end() -> None:
    """A failpoint holds the step loop for 6 s while its threads live: NOT_SERVING within 4 s, SERVING again after."""
    with running_stack(env={"ISTHMUS_FAILPOINTS": "decode.step=sleep(6)@10"}) as stack:
        address = stack.services("decode")[0]["grpc"]
        changes: list[tuple[float, int]] = []

        async def watch() -> None:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
                    changes.append((time.monotonic(), answer.status))

        watcher = asyncio.create_task(watch())
        async with StackClient(stack.router) as client:
            generating = asyncio.create_task(client.failing_or_not(request("And", max_tokens=40, ignore_eos=True)))
            began = time.monotonic()
            slowest = 0.0
            while time.monotonic() - began < 5.0:
                asked = time.monotonic()
                await status(address)
                slowest = max(slowest, time.monotonic() - asked)
                await asyncio.sleep(0.1)
            assert slowest < 0.5, "GetStatus answers while the step loop is held"

            async def serves_again() -> bool:
                return [state for _, state in changes][-1] == SERVING and len(changes) >= 3

            await until(serves_again, 10, "SERVING after the stall")
            generating.cancel()
        watcher.cancel()
        stalled_at = next(at for at, state in changes if state == NOT_SERVING)
        assert stalled_at - began < 4.5


async def test_a_stopped_worker_is_not_serving_within_4_s() -> None:
    """SIGSTOP: nobody answers there, and the router's view says so; after SIGCONT it serves again."""
    with running_stack("--decode", "2") as stack:
        frozen = stack.services("decode")[0]

        async def seen_serving() -> dict[str, bool]:
            return {worker.name: worker.serving for worker in (await status(stack.router)).workers}

        os.kill(frozen["pid"], signal.SIGSTOP)
        try:
            began = time.monotonic()

            async def shown() -> bool:
                return not (await seen_serving()).get(frozen["name"], False)

            await until(shown, 4.0, "the router's view of a frozen worker")
            assert time.monotonic() - began < 4.0
            async with StackClient(stack.router) as client:
                result = await client.generate(request("Hello", max_tokens=5, ignore_eos=True), timeout_s=10)
            assert result.finished.workers.decode != frozen["name"]
        finally:
            os.kill(frozen["pid"], signal.SIGCONT)

        async def back() -> bool:
            return (await seen_serving()).get(frozen["name"], False)

        await until(back, 10, "a woken worker serves again")


async def test_draining_is_not_serving(stack: Stack) -> None:
    """Asked of a stack of its own, because a drained service stays so."""
    from isthmus.v1 import admin_pb2, admin_pb2_grpc

    with running_stack("--decode", "2") as own:
        address = own.services("decode")[0]["grpc"]
        async with grpc.aio.insecure_channel(address) as channel:
            answer = await admin_pb2_grpc.AdminServiceStub(channel).Drain(
                admin_pb2.DrainRequest(timeout_ms=5000), timeout=10
            )
        assert answer.drained
        assert await check(address) == NOT_SERVING
        async with StackClient(own.router) as client:
            result = await client.generate(request("Hello", max_tokens=5, ignore_eos=True))
        assert result.finished.workers.decode == own.services("decode")[1]["name"]
