"""Which workers are used: leases, sessions, stalls, numerics classes, and Redis going away. In virtual time."""

from collections.abc import Iterator
from typing import Any

import pytest

from isthmus.errors import InvalidRequest, IsthmusError
from router.pool.policy import NO_NEW_WORK_S
from router.pool.worker_pool import UNLISTED_S
from tests.router.fakes import VIEW_INTERVAL_S, Cluster, RouterUnderTest, ask
from tests.router.scripted_decode import SCRIPT
from tests.router.scripted_links import LATENCY_S


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    made.add_decode()
    made.add_prefill()
    return made


@pytest.fixture
def router(cluster: Cluster) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(cluster).meet_workers()
    yield router
    router.is_quiet()


def test_serves_on_while_redis_is_down(router: RouterUnderTest) -> None:
    router.cluster.is_registry_down = True
    router.time.run_until(lambda: router.pool.is_degraded, "degraded")
    router.time.run_for(60.0)

    assert router.generate(ask(max_tokens=5)).text == "The q"

    router.cluster.is_registry_down = False
    router.time.run_until(lambda: not router.pool.is_degraded, "back")


def test_a_flushed_registry_stops_placement_and_ends_no_stream(router: RouterUnderTest) -> None:
    decode = router.cluster.decode[0]
    decode.token_interval_s = 0.1
    running = router.call(ask(max_tokens=60))
    router.time.run_until(lambda: len(decode.streams) == 1, "decoding")
    records = dict(router.cluster.records)
    router.cluster.records.clear()
    flushed_at = router.time.now()

    def is_unused() -> bool:
        return not (router.pool.usable_prefill(router.time.now()) or router.pool.usable_decode(router.time.now()))

    router.time.run_until(is_unused, "view refreshed")
    assert router.time.now() - flushed_at >= UNLISTED_S - VIEW_INTERVAL_S
    assert router.pool.decode[decode.incarnation].session.is_alive
    assert running.to_the_end().tokens == (SCRIPT * 2)[:60]
    router.cluster.records.update(records)
    assert router.generate(ask(max_tokens=3)).text == "The"


@pytest.mark.parametrize("changes", [{"serving": False}, {"seconds_since_progress": 1.5}])
def test_a_worker_without_progress_or_draining_gets_no_new_work(
    router: RouterUnderTest, changes: dict[str, Any]
) -> None:
    spare = router.cluster.add_decode("d1")
    router.meet_workers()
    router.cluster.change(router.cluster.decode[0].incarnation, **changes)
    router.time.run_until(lambda: len(router.pool.usable_decode(router.time.now())) == 1, "one left")

    router.generate(ask(max_tokens=5))

    assert len(spare.reserves) == 1
    assert not router.cluster.decode[0].reserves


def test_a_stalled_decode_worker_loses_its_streams_to_another(router: RouterUnderTest) -> None:
    first = router.cluster.decode[0]
    first.max_tokens_sent = 3
    call = router.call(ask(max_tokens=50))
    call.read(3)
    spare = router.cluster.add_decode("d1")

    router.cluster.change(first.incarnation, state="stalled", serving=False, seconds_since_progress=3.1)

    assert call.to_the_end().tokens == (SCRIPT * 2)[:50]
    assert len(spare.reserves[0].request.emitted_token_ids) == 3


def test_a_stalled_prefill_worker_loses_its_requests_to_another(router: RouterUnderTest) -> None:
    first = router.cluster.prefill[0]
    first.holds = True
    running = router.call(ask(max_tokens=5))
    router.time.run_until(lambda: len(first.requests) == 1, "prefilling")
    spare = router.cluster.add_prefill("p1")

    router.cluster.change(first.incarnation, seconds_since_progress=3.5, serving=False, state="stalled")

    assert running.to_the_end().text == "The q"
    assert len(spare.requests) == 1
    assert first.num_cancelled == 1


def test_a_silent_session_with_running_streams_gets_no_new_work(router: RouterUnderTest) -> None:
    router.cluster.decode[0].max_tokens_sent = 3
    call = router.call(ask(max_tokens=50))
    call.read(3)
    heard_at = router.time.now()

    router.time.run_until(lambda: not router.pool.usable_decode(router.time.now()), "silent for a second")
    assert router.time.now() - heard_at == pytest.approx(NO_NEW_WORK_S, abs=VIEW_INTERVAL_S)
    call.leave()
    router.meet_workers()  # nothing is owed any more


def test_another_incarnation_at_the_address_is_not_taken_for_the_first(cluster: Cluster) -> None:
    cluster.decode[0].incarnation = "f" * 32  # what it says; the registry still names the one before
    router = RouterUnderTest(cluster)
    router.time.run_for(5.0)
    assert len(router.pool.decode) == 1
    assert not router.pool.usable_decode(router.time.now())
    assert len(cluster.decode[0].hellos) > 3, "it was tried again and again"


def test_a_worker_that_leaves_the_registry_while_its_session_blips_loses_its_streams(router: RouterUnderTest) -> None:
    spare = router.cluster.add_decode("d1")
    router.meet_workers()
    for worker in router.cluster.decode:
        worker.token_interval_s = 0.2
    call = router.call(ask(max_tokens=30))
    call.read(3)
    first = router.cluster.serving()
    del router.cluster.records[first.incarnation]
    router.time.run_for(UNLISTED_S + VIEW_INTERVAL_S)
    assert first.incarnation in router.pool.decode, "its session is alive"

    first.is_up = False  # it does not come back from its blip in time
    first.lose_sessions()
    result = call.to_the_end()

    assert result.tokens == (SCRIPT * 2)[:30]
    assert result.end.num_attempts == 2
    assert result.end.workers.decode == router.cluster.other(first).name
    assert first.incarnation not in router.pool.decode
    assert spare in router.cluster.decode


def test_a_session_whose_worker_does_not_read_is_given_up_and_made_again(router: RouterUnderTest) -> None:
    spare = router.cluster.add_decode("d1")
    router.meet_workers()
    for worker in router.cluster.decode:
        worker.token_interval_s = 0.05
    calls = [router.call(ask(max_tokens=20)) for _ in range(3)]
    for call in calls:
        call.read(3)
    first = next(worker for worker in router.cluster.decode if worker.streams)
    num_hellos = len(first.hellos)
    first.reads = False

    leaving, *others = [call for call in calls if call.request_id in first.streams]
    leaving.leave()  # its cancel is the message too many

    assert all(call.to_the_end().tokens == SCRIPT[:20] for call in calls if call is not leaving)
    assert all(call.result.end.num_attempts == 2 for call in others)
    first.reads = True
    router.meet_workers()
    assert len(first.hellos) > num_hellos
    assert not first.hellos[num_hellos].streams, "what was given up is not named"
    assert spare in router.cluster.decode


def test_workers_of_other_models_are_not_seen_and_other_classes_not_paired(router: RouterUnderTest) -> None:
    incarnation = router.cluster.prefill[0].incarnation

    def usable() -> list[Any]:
        return router.pool.usable_prefill(router.time.now())

    router.cluster.change(incarnation, numerics_digest="other")
    router.time.run_until(lambda: usable()[0].numerics.numerics_digest == "other", "changed")
    with pytest.raises(IsthmusError) as refusal:
        router.generate(ask(max_tokens=5))
    assert refusal.value.reason == "WORKERS_UNAVAILABLE"

    router.cluster.change(incarnation, model_digest="other")
    router.time.run_until(lambda: not usable(), "not seen")


def test_a_request_no_worker_could_ever_hold_is_refused(router: RouterUnderTest) -> None:
    record = router.cluster.records[router.cluster.decode[0].incarnation]
    small = type(record.load)(type(record.load.blocks)(total=4, free=4, cached=0, referenced=0))
    router.cluster.change(record.incarnation, load=small)
    router.time.run_for(VIEW_INTERVAL_S)

    with pytest.raises(InvalidRequest) as refusal:
        router.generate(ask("12345", max_tokens=100))

    assert refusal.value.violations[0].field == "sampling.max_tokens"
    assert "at most 64" in refusal.value.detail


def test_status_names_every_worker(router: RouterUnderTest) -> None:
    status = {worker.name: worker for worker in router.pool.status(router.time.now())}
    assert status["d0"].serving
    assert (status["p0"].role, status["d0"].blocks.total) == ("prefill", 1000)


def test_a_pool_that_closes_tells_every_stream(router: RouterUnderTest) -> None:
    router.cluster.decode[0].max_tokens_sent = 3
    call = router.call(ask(max_tokens=50), timeout_s=5.0)
    call.read(3)
    router.cluster.records.clear()

    router.pool.close(router.time.now())
    router.time.run_for(2 * LATENCY_S)

    assert not router.cluster.decode[0].streams
    with pytest.raises(IsthmusError) as told:
        call.to_the_end()
    assert told.value.reason in ("WORKERS_UNAVAILABLE", "DEADLINE_PASSED")
