"""The router's connections to workers, over real ports: a session connects, blips and comes back; a call breaks off."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import grpc.aio
import pytest

from isthmus.clock import SystemClock
from isthmus.errors import WorkerLost
from isthmus.process.rpc import channel
from isthmus.routine import Answer
from isthmus.v1 import prefill_pb2
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.store import StoreUnavailable, WorkerRecord
from router.pool.decode_stream import Failed
from router.pool.drivers import GrpcPrefillLink, Registry, Tasks
from tests.router.fakes import Cluster, ask
from tests.router.real_ports import (
    DecodeServer,
    PrefillServer,
    ServedRouter,
    listening,
    read,
    real_links,
    real_time_cluster,
    served_router,
    until,
)
from tests.router.scripted_decode import SCRIPT

LONG = (SCRIPT * 2)[:60]


@pytest.fixture
async def router() -> AsyncIterator[ServedRouter]:
    """Over two decode workers and a prefill worker behind ports."""
    cluster = real_time_cluster()
    async with AsyncExitStack() as stack:
        for name in ("d0", "d1"):
            decode = DecodeServer()
            decode.worker = cluster.add_decode(name, await stack.enter_async_context(listening(decode.register)))
            decode.worker.token_interval_s = 0.005
        prefill = PrefillServer()
        prefill.worker = cluster.add_prefill("p0", await stack.enter_async_context(listening(prefill.register)))
        links = await stack.enter_async_context(real_links())
        served = await stack.enter_async_context(served_router(cluster, links=links))
        yield served
        await served.is_quiet()


async def test_a_request_passes_through_real_ports(router: ServedRouter) -> None:
    result = await router.generate(ask(max_tokens=60))

    assert result.tokens == LONG
    assert result.end.timings.transfer_bytes == 4096


async def test_a_session_that_breaks_off_is_made_again_and_names_its_streams(router: ServedRouter) -> None:
    cluster = router.cores.cluster
    for worker in cluster.decode:
        worker.keeps_streams = True
    call = router.call(ask(max_tokens=60))
    result = await read(call, 5)
    worker = cluster.serving()

    worker.lose_sessions()
    await read(call, result=result)

    assert result.tokens == LONG
    assert result.end.num_attempts == 1
    (cursor,) = worker.hellos[-1].streams
    assert cursor.request_id == result.start.request_id
    assert cursor.next_index >= 5


async def test_a_worker_that_hangs_up_for_good_is_replaced(router: ServedRouter) -> None:
    call = router.call(ask(max_tokens=60))
    result = await read(call, 5)
    worker = router.cores.cluster.serving()

    worker.lose_sessions()  # and keeps nothing
    await read(call, result=result)

    assert result.tokens == LONG
    assert result.end.num_attempts == 2


async def test_a_prefill_call_that_breaks_off_is_told(router: ServedRouter) -> None:
    router.cores.cluster.prefill[0].crash = lambda call: WorkerLost("crashed") if call == 1 else None

    result = await router.generate(ask(max_tokens=60))

    assert result.tokens == LONG
    assert result.end.num_attempts == 2
    assert [event.cause for event in router.cores.events("attempt.failed")] == ["WORKER_LOST"]


async def test_a_prefill_call_that_is_dropped_is_cancelled_at_the_worker(router: ServedRouter) -> None:
    prefill = router.cores.cluster.prefill[0]
    prefill.holds = True
    call = router.call(ask(max_tokens=60))
    await until(lambda: prefill.runs, "prefilling")

    call.cancel()

    await until(lambda: prefill.num_cancelled == 1, "the worker was told")


async def test_a_stream_is_found_where_it_is(router: ServedRouter) -> None:
    call = router.call(ask(max_tokens=4000))
    result = await read(call, 5)
    answers: dict[str, Answer[int | None]] = {}
    for worker in router.cores.pool.decode.values():
        answers[worker.record.name] = Answer(lambda: None)
        worker.link.find(result.start.request_id, answers[worker.record.name])

    await until(lambda: all(answer.has_come for answer in answers.values()), "answers")

    serving = router.cores.cluster.serving()
    assert (answers.pop(serving.name).value or 0) >= 5
    assert [answer.value for answer in answers.values()] == [None]
    call.cancel()


@dataclass
class Listener:
    said: list[Any] = field(default_factory=list)

    def take(self, response: prefill_pb2.PrefillResponse, at: float) -> None:
        self.said.append(response)

    def failed(self, failure: Failed, at: float) -> None:
        self.said.append(failure)


@pytest.mark.parametrize("how", ["nobody listens", "the channel was closed"])
async def test_a_prefill_worker_that_is_not_there_is_lost(how: str) -> None:
    tasks = Tasks()
    to_nobody = channel("127.0.0.1:1")
    link = GrpcPrefillLink(to_nobody, SystemClock(), tasks)
    if how == "the channel was closed":
        await to_nobody.close()
    listener = Listener()

    link.call(prefill_pb2.PrefillRequest(), listener, 5.0)

    await until(lambda: listener.said, "told")
    (failure,) = listener.said
    assert isinstance(failure.error, WorkerLost)
    link.close()
    await tasks.end(1.0)


class BreakableStore(MemoryOwnership):
    """The in-memory twin, until it is switched off."""

    is_down = False

    async def list_workers(self) -> list[WorkerRecord]:
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().list_workers()


async def test_the_registry_is_read_again_and_again_whether_it_answers_or_not() -> None:
    store = BreakableStore(SystemClock())
    cluster: Cluster = real_time_cluster()
    cluster.add_prefill()
    (record,) = cluster.records.values()
    await store.put_worker(record, 60.0)
    registry = Registry(store, SystemClock())
    seen: list[Any] = []

    class Pool:
        def take_view(self, records: list[WorkerRecord], now: float) -> None:
            seen.append([record.name for record in records])

        def miss_view(self, problem: str, now: float) -> None:
            seen.append(problem)

    pool: Any = Pool()
    watching = asyncio.create_task(registry.watch(pool))
    await until(lambda: seen, "a view")
    store.is_down = True
    await until(lambda: "StoreUnavailable: down" in seen, "no view")
    store.is_down = False
    await until(lambda: seen[-1] == ["p0"], "a view again")
    hint: Answer[str | None] = Answer(lambda: None)
    registry.find_stream("unknown", hint)
    await until(lambda: hint.has_come, "an answer")
    assert hint.value is None
    watching.cancel()
    await asyncio.wait({watching})
    await registry.close()


class CallBeingSent:
    """A Prefill call whose request is on its way: gRPC does not end it when its reader is cancelled just then."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def __aiter__(self) -> "CallBeingSent":
        return self

    async def __anext__(self) -> prefill_pb2.PrefillResponse:
        await asyncio.Event().wait()
        raise StopAsyncIteration

    def cancel(self) -> bool:
        self.is_cancelled = True
        return True


async def test_a_prefill_call_that_is_dropped_while_it_is_being_sent_ends() -> None:
    call = CallBeingSent()
    tasks = Tasks()
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        link = GrpcPrefillLink(channel, SystemClock(), tasks)
        link._stub = SimpleNamespace(Prefill=lambda *_, **__: call)  # type: ignore[assignment]
        drop = link.call(prefill_pb2.PrefillRequest(), MagicMock(), 60.0)
        await asyncio.sleep(0)
        drop()
        await tasks.end(1.0)
    assert call.is_cancelled
