"""Which workers are used: leases, sessions, stalls, numerics classes, and Redis going away."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from isthmus.clock import SystemClock
from isthmus.errors import InvalidRequest, IsthmusError
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.store import StoreUnavailable, WorkerRecord
from tests.router.fakes import SCRIPT, Cluster, RunningRouter, ask, rest, running_router, until


class BreakableStore(MemoryOwnership):
    """The in-memory twin, until it is switched off."""

    is_down = False

    async def list_workers(self) -> list[WorkerRecord]:
        if self.is_down:
            raise StoreUnavailable("down")
        return await super().list_workers()


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster(store=BreakableStore(SystemClock()))
    await made.add_decode()
    await made.add_prefill()
    yield made
    await made.close()


@pytest.fixture
async def router(cluster: Cluster) -> AsyncIterator[RunningRouter]:
    async with running_router(cluster) as running:
        yield running
        await running.is_quiet()


async def test_serves_on_while_redis_is_down(router: RunningRouter) -> None:
    store = router.cluster.store
    assert isinstance(store, BreakableStore)
    store.is_down = True
    await until(lambda: router.pool.is_degraded, "degraded")

    assert (await router.generate(ask(max_tokens=5))).text == "The q"

    store.is_down = False
    await until(lambda: not router.pool.is_degraded, "back")


async def test_a_flushed_registry_stops_placement_and_ends_no_stream(router: RunningRouter) -> None:
    router.cluster.decode[0].token_interval_s = 0.01
    running = asyncio.create_task(router.generate(ask(max_tokens=60)))
    await until(lambda: len(router.cluster.decode[0].streams) == 1, "decoding")

    for record in router.cluster.records.values():
        await router.cluster.store.drop_worker(record.incarnation)
    await until(lambda: not router.pool.usable_prefill() and not router.pool.usable_decode(), "view refreshed")

    assert router.pool.decode[router.cluster.decode[0].incarnation].session.is_alive
    assert len((await running).token_ids) == 60
    for record in router.cluster.records.values():
        await router.cluster.register(record)
    assert (await router.generate(ask(max_tokens=3))).text == "The"


@pytest.mark.parametrize("changes", [{"serving": False}, {"seconds_since_progress": 1.5}])
async def test_a_worker_without_progress_or_draining_gets_no_new_work(router: RunningRouter, changes: dict) -> None:  # type: ignore[type-arg]
    spare = await router.cluster.add_decode("d1")
    await until(lambda: len(router.pool.usable_decode()) == 2, "both")
    await router.cluster.change(router.cluster.decode[0].incarnation, **changes)
    await until(lambda: len(router.pool.usable_decode()) == 1, "one left")

    await router.generate(ask(max_tokens=5))

    assert len(spare.reserves) == 1
    assert not router.cluster.decode[0].reserves


async def test_a_stalled_decode_worker_loses_its_streams_to_another(router: RunningRouter) -> None:
    first = router.cluster.decode[0]
    first.max_tokens_sent = 3
    call = router.call(ask(max_tokens=50))
    tokens = [(await call.read()).tokens]
    while tokens[-1].index < 2:
        tokens.append((await call.read()).tokens)
    spare = await router.cluster.add_decode("d1")

    await router.cluster.change(first.incarnation, state="stalled", serving=False, seconds_since_progress=3.1)

    tokens += [response.tokens async for response in rest(call)]
    assert bytes(token.id for chunk in tokens for token in chunk.tokens) == (SCRIPT * 2)[:50]
    assert len(spare.reserves[0].request.emitted_token_ids) == 3


async def test_a_stalled_prefill_worker_loses_its_requests_to_another(router: RunningRouter) -> None:
    first = router.cluster.prefill[0]
    first.hold_first_token = asyncio.Event()
    running = asyncio.create_task(router.generate(ask(max_tokens=5)))
    await until(lambda: len(first.requests) == 1, "prefilling")
    spare = await router.cluster.add_prefill("p1")

    await router.cluster.change(first.incarnation, seconds_since_progress=3.5, serving=False, state="stalled")

    assert (await running).text == "The q"
    assert len(spare.requests) == 1
    assert first.num_cancelled == 1


async def test_a_silent_session_with_running_streams_gets_no_new_work(router: RunningRouter) -> None:
    router.cluster.decode[0].max_tokens_sent = 3
    call = router.call(ask(max_tokens=50))
    while (await call.read()).tokens.index < 2:
        pass

    await until(lambda: not router.pool.usable_decode(), "silent for a second")
    call.cancel()
    await until(lambda: len(router.pool.usable_decode()) == 1, "nothing is owed any more")


async def test_another_incarnation_at_the_address_is_not_taken_for_the_first(cluster: Cluster) -> None:
    cluster.decode[0].incarnation = "f" * 32  # what it says; the registry still names the one before
    async with running_router(cluster, wait=False) as router:
        await until(lambda: len(router.pool.decode) == 1, "seen")
        await asyncio.sleep(0.2)
        assert not router.pool.usable_decode()


async def test_workers_of_other_models_are_not_seen_and_other_classes_not_paired(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.placement.GONE_WAIT_S", 0.2)
    await router.cluster.change(router.cluster.prefill[0].incarnation, numerics_digest="other")
    await until(lambda: router.pool.usable_prefill()[0].numerics.numerics_digest == "other", "changed")
    with pytest.raises(IsthmusError) as refusal:
        await router.generate(ask(max_tokens=5))
    assert refusal.value.reason == "WORKERS_UNAVAILABLE"

    await router.cluster.change(router.cluster.prefill[0].incarnation, model_digest="other")
    await until(lambda: not router.pool.usable_prefill(), "not seen")


async def test_a_request_no_worker_could_ever_hold_is_refused(router: RunningRouter) -> None:
    record = router.cluster.records[router.cluster.decode[0].incarnation]
    small = type(record.load)(type(record.load.blocks)(total=4, free=4, cached=0, referenced=0))
    await router.cluster.change(record.incarnation, load=small)
    await until(lambda: router.pool.usable_decode()[0].view(0).total_blocks == 4, "changed")

    with pytest.raises(InvalidRequest) as refusal:
        await router.generate(ask("12345", max_tokens=100))

    assert refusal.value.violations[0].field == "sampling.max_tokens"
    assert "at most 64" in refusal.value.detail


async def test_status_names_every_worker(router: RunningRouter) -> None:
    status = {worker.name: worker for worker in router.pool.status()}
    assert status["d0"].serving
    assert (status["p0"].role, status["d0"].blocks.total) == ("prefill", 1000)
