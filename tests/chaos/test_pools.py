"""Planned changes under load: pools reshaped, every process restarted, a decode worker emptied. Nobody notices."""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import grpc.aio
import pytest

from isthmus.testing.processes import Worker, added_worker, serves, until_known
from isthmus.testing.stack import Stack, ledger, running_stack, status, until
from isthmus.v1 import admin_pb2, admin_pb2_grpc
from tests.chaos.faults import Injected
from tests.chaos.history import Oracle, Record
from tests.chaos.ledgers import save_ledger
from tests.chaos.unharmed import unharmed_load

NUM_USERS = 8
RESTARTED_WITHIN_S = 45.0
DRAIN_S = 10.0

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]


async def grown(stack: Stack, held: ExitStack, role: str, *names: str) -> list[Worker]:
    workers = [held.enter_context(added_worker(stack, role, name)) for name in names]
    await asyncio.gather(*(until_known(stack, worker) for worker in workers))
    return workers


async def shrunk(stack: Stack, workers: list[Worker], faults: list[Injected]) -> None:
    """One after the other, by SIGTERM; each leaves with status 0."""
    for worker in workers:
        faults.append(Injected(f"retire {worker.role}", worker.name, time.monotonic()))
        await save_ledger(stack, {"name": worker.name, "grpc": worker.grpc})
        assert await worker.retire() == 0, f"{worker.name} ended with an error"
        faults[-1].served_at = time.monotonic()


async def test_pools_are_reshaped_under_load(expected: dict[str, Oracle]) -> None:
    with running_stack() as stack, ExitStack() as held:
        prefills = await grown(stack, held, "prefill", "prefill-a", "prefill-b")
        async with unharmed_load(stack, expected, num_users=NUM_USERS) as run:
            decodes = await grown(stack, held, "decode", "decode-a", "decode-b")
            await shrunk(stack, prefills, run.faults)  # 1P3D
            await grown(stack, held, "prefill", "prefill-c", "prefill-d")
            await shrunk(stack, decodes, run.faults)  # 3P1D


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack("--routers", "2", "--prefill", "2", "--decode", "2") as stack:
        yield stack


async def test_every_process_is_restarted_under_load(stack: Stack, expected: dict[str, Oracle]) -> None:
    async with unharmed_load(stack, expected, num_users=NUM_USERS) as run:
        for number in range(2):
            same = [entry for entry in stack.current() if entry["name"].endswith(f"-{number}")]
            await asyncio.gather(*(restarted(stack, entry, run.faults) for entry in same))
        await restarted(stack, stack.process_named("redis"), run.faults)


async def restarted(stack: Stack, entry: Mapping[str, str], faults: list[Injected]) -> None:
    """SIGTERM; returns when the successor serves."""
    name, pool = entry["name"], entry["pool"]
    fault = Injected(f"restart {pool}", name, time.monotonic())
    faults.append(fault)
    stack.send(name, signal.SIGTERM)

    async def succeeded() -> bool:
        if stack.process_named(name)["pid"] in (None, entry["pid"]):
            return False
        return pool == "redis" or await serves(stack, name, entry["grpc"], pool)

    await until(succeeded, RESTARTED_WITHIN_S, f"{name} serves again")
    fault.served_at = time.monotonic()


async def test_a_drained_decode_worker_moves_its_streams(stack: Stack, expected: dict[str, Oracle]) -> None:
    drained, other = stack.services("decode")
    async with unharmed_load(stack, expected, num_users=NUM_USERS) as run:
        await until(lambda: has_streams(drained["grpc"], NUM_USERS // 4), 10, "streams on the worker to be drained")
        run.faults.append(Injected("drain decode", drained["name"], time.monotonic()))
        answer = await drain(drained["grpc"])
        run.faults[-1].served_at = time.monotonic()
        assert answer.drained, f"{answer.num_left} streams left after {DRAIN_S:g} s"
        assert not (await status(drained["grpc"])).serving
        assert (await status(other["grpc"])).serving
    events = await events_of(stack, run.records)
    took_s = run.faults[0].served_at - run.faults[0].at
    print(f"{events['request.moved']} streams moved in {took_s:.2f} s")
    assert events["request.moved"] >= 1
    assert events["stream.replayed"] == 0, "a move recomputes nothing"
    assert events["prefill.first_token"] == len(run.records), "each prompt was computed once"
    await restarted(stack, stack.process_named(drained["name"]), [])


async def has_streams(address: str, count: int) -> bool:
    return (await status(address)).num_streams >= count


async def drain(address: str) -> admin_pb2.DrainResponse:
    async with grpc.aio.insecure_channel(address) as channel:
        message = admin_pb2.DrainRequest(timeout_ms=int(1000 * DRAIN_S))
        return await admin_pb2_grpc.AdminServiceStub(channel).Drain(message, timeout=DRAIN_S + 5)


async def events_of(stack: Stack, records: Sequence[Record]) -> Counter[str]:
    """How often each event stands in the ledgers of all services, of these requests."""
    asked = {request_id for record in records for request_id in record.request_ids}
    ledgers = await asyncio.gather(*(ledger(entry["grpc"]) for entry in stack.current() if "grpc" in entry))
    return Counter(event.event for told in ledgers for event in told if event.request_id in asked)
