"""The life of a service process: ports, health, admin, HTTP, signal, drain."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncGenerator, Sequence
from functools import partial

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from isthmus.clock import SystemClock
from isthmus.config import RouterConfig, load
from isthmus.errors import CannotStart
from isthmus.ledger import Ledger, LedgerEvent
from isthmus.metrics import RequestMetrics
from isthmus.process.admin import NOT_STORED, STORED_EVENT, Identity, ReadStoredHandoffs, ServiceHooks
from isthmus.process.health import HealthState, ProgressWatch
from isthmus.process.rpc import channel
from isthmus.process.serving import Face, Stop, exit_status, serve_until_signal
from isthmus.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc

SERVICE = "isthmus.v1.InferenceService"


class Running:
    """A service under test and what its hooks saw."""

    def __init__(self, *argv: str):
        self.config = load(RouterConfig, argv, {})
        self.clock = SystemClock()
        self.health = HealthState(ProgressWatch(self.clock, stall_s=0.3))
        self.identity = Identity(self.config.name, "router", "ab" * 16)
        self.metrics = RequestMetrics()
        self.ledger = Ledger(self.clock)
        self.drains: list[float] = []
        self.left = 0
        self.stored_handoffs: ReadStoredHandoffs | None = None
        self.entered = asyncio.Event()
        self.closed = False
        self.stop: Stop | None = None

    async def drain(self, timeout_s: float) -> int:
        self.drains.append(timeout_s)
        return self.left

    @contextlib.asynccontextmanager
    async def work(self, stop: Stop) -> AsyncGenerator[None]:
        self.stop = stop
        self.health.ready()
        self.entered.set()
        yield
        self.closed = True

    def face(self) -> Face:
        status = admin_pb2.GetStatusResponse(num_streams=3)
        hooks = ServiceHooks(lambda: status, self.drain, self.ledger, self.metrics, self.stored_handoffs)
        service = inference_pb2_grpc.InferenceServiceServicer()
        register = partial(inference_pb2_grpc.add_InferenceServiceServicer_to_server, service)
        return Face(self.config, self.identity, self.health, hooks, self.clock, SERVICE, register)


@contextlib.asynccontextmanager
async def serving(running: Running) -> AsyncGenerator[grpc.aio.Channel]:
    task = asyncio.create_task(serve_until_signal(running.face(), running.work))
    async with asyncio.timeout(5):
        await running.entered.wait()
    try:
        async with channel(running.identity.grpc_address) as opened:
            yield opened
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            await task


async def http_get(address: str, path: str) -> tuple[int, str]:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    raw = (await asyncio.wait_for(reader.read(), 5)).decode()
    writer.close()
    await writer.wait_closed()
    head, _, body = raw.partition("\r\n\r\n")
    return int(head.split()[1]), body


async def test_status_names_the_process_and_its_counters():
    running = Running("--name", "r1")
    running.metrics.tokens.labels(kind="prompt").inc(7)
    async with serving(running) as opened:
        stub = admin_pb2_grpc.AdminServiceStub(opened)
        status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=2)
    assert (status.name, status.role, status.pid, status.num_streams) == ("r1", "router", os.getpid(), 3)
    assert (status.state, status.serving, status.grpc_address) == ("idle", True, running.identity.grpc_address)
    assert status.counters['isthmus_tokens_total{kind="prompt"}'] == 7
    assert status.num_fds > 0
    assert status.num_threads > 0


async def test_health_follows_a_stalled_loop_and_its_recovery():
    running = Running()
    async with serving(running) as opened:
        watch = health_pb2_grpc.HealthStub(opened).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
        seen = [(await watch.read()).status]
        running.health.watch.begin_work()
        seen.append((await watch.read()).status)
        running.health.watch.step_done()
        seen.append((await watch.read()).status)
        watch.cancel()
        assert (await http_get(running.identity.http_address, "/readyz"))[0] == 200
    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING, seen[0]]


async def test_unknown_service_is_told_so():
    async with serving(Running()) as opened:
        stub = health_pb2_grpc.HealthStub(opened)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=2)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"), timeout=2)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


async def test_reflection_lists_every_service():
    async with serving(Running()) as opened:
        call = reflection_pb2_grpc.ServerReflectionStub(opened).ServerReflectionInfo(timeout=2)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        call.cancel()
    names = {service.name for service in answer.list_services_response.service}
    assert {SERVICE, "isthmus.v1.AdminService", "grpc.health.v1.Health"} <= names


async def test_http_tells_life_readiness_and_metrics():
    running = Running()
    async with serving(running):
        address = running.identity.http_address
        running.health.not_ready("layout: block_size 16 != 32")
        assert await http_get(address, "/livez") == (200, "ok\n")
        code, body = await http_get(address, "/readyz")
        exposition = (await http_get(address, "/metrics"))[1]
    assert code == 503
    assert json.loads(body) == {"state": "not_ready", "serving": False, "reason": "layout: block_size 16 != 32"}
    assert 'isthmus_blocks{state="free"} 0.0' in exposition
    assert "isthmus_serving 0.0" in exposition


async def test_drain_ends_serving_for_good_and_reports_what_is_left():
    running = Running()
    running.left = 2
    async with serving(running) as opened:
        answer = await admin_pb2_grpc.AdminServiceStub(opened).Drain(admin_pb2.DrainRequest(timeout_ms=1500), timeout=2)
        running.health.ready()
        assert not running.health.snapshot().serving
    assert (answer.drained, answer.num_left, running.drains[0]) == (False, 2, 1.5)


async def test_ledger_is_read_by_request():
    running = Running()
    running.ledger.record("handoff.claimed", request_id="a", attempt=1, blocks=4)
    running.ledger.record("handoff.claimed", request_id="b")
    async with serving(running) as opened:
        stub = admin_pb2_grpc.AdminServiceStub(opened)
        answer = await stub.Ledger(admin_pb2.LedgerRequest(request_id="a"), timeout=2)
    assert [(event.request_id, event.attempt, event.fields["blocks"]) for event in answer.events] == [("a", 1, "4")]


async def test_what_the_store_holds_of_a_request_s_transfers_follows_its_ledger():
    running = Running()
    asked: list[tuple[str, list[str]]] = []

    async def stored(request_id: str, transfer_ids: Sequence[str]) -> list[LedgerEvent]:
        asked.append((request_id, list(transfer_ids)))
        return [LedgerEvent(0, 0, STORED_EVENT, request_id, name, cause=NOT_STORED) for name in transfer_ids]

    running.stored_handoffs = stored
    for number in range(40):
        running.ledger.record("stream.reserved", request_id="a", transfer_id=f"t{number}")
    running.ledger.record("stream.reserved", request_id="b", transfer_id="another")
    async with serving(running) as opened:
        stub = admin_pb2_grpc.AdminServiceStub(opened)
        answers = [await stub.Ledger(admin_pb2.LedgerRequest(request_id=name), timeout=2) for name in ("a", "t1", "")]
    newest = [f"t{number}" for number in range(8, 40)]
    assert asked == [("a", newest)], "not for a transfer, and not for all requests"
    assert [len(answer.events) for answer in answers] == [40 + 32, 1, 41]
    assert [(event.event, event.transfer_id) for event in answers[0].events][40:] == [
        (STORED_EVENT, name) for name in newest
    ]


async def test_signal_drains_then_closes_the_work():
    running = Running()
    async with serving(running):
        assert not running.closed
    assert running.closed
    assert running.drains == [3.0]


async def test_signal_while_the_work_is_still_being_entered_ends_it_at_once():
    running = Running()

    @contextlib.asynccontextmanager
    async def endless(stop: Stop) -> AsyncGenerator[None]:
        running.entered.set()
        await asyncio.sleep(60)
        yield

    task = asyncio.create_task(serve_until_signal(running.face(), endless))
    await running.entered.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(2):
        await task
    assert running.drains == []


async def test_a_fatal_error_of_the_work_ends_the_process_without_drain():
    running = Running()
    running.left = 1
    task = asyncio.create_task(serve_until_signal(running.face(), running.work))
    await running.entered.wait()
    assert running.stop is not None
    running.stop.request(RuntimeError("step loop died"))
    with pytest.raises(RuntimeError, match="step loop died"):
        await asyncio.wait_for(task, 3)


@pytest.mark.parametrize("setting", ["grpc_port", "http_port"])
async def test_taken_port_is_named_with_its_mend(setting: str):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        running = Running("--" + setting.replace("_", "-"), str(taken.getsockname()[1]))
        with pytest.raises(CannotStart, match=f"{setting}.*0 for a free one"):
            await serve_until_signal(running.face(), running.work)


def test_process_that_cannot_start_says_so_in_one_line_and_exits_2(capsys: pytest.CaptureFixture[str]):
    async def main(config: RouterConfig) -> None:
        raise ExceptionGroup("tasks", [CannotStart("redis_url", "no answer at 127.0.0.1:1", "start Redis")])

    assert exit_status(RouterConfig, main, []) == 2
    assert exit_status(RouterConfig, main, ["--grpc-port", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "isthmus router: cannot start: redis_url: no answer at 127.0.0.1:1. To mend it: start Redis"
    assert lines[1].startswith("isthmus router: cannot start: grpc_port: given 'x'")
    assert len(lines) == 2
