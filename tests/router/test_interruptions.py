"""Ends that come at an awkward moment: what a request holds is let go, and what its client is told stays in order."""

from collections.abc import Iterator

import pytest

from isthmus.errors import (
    AttachedElsewhere,
    DeadlinePassed,
    IndexOutOfRange,
    Overloaded,
    RequestCancelled,
    WorkerLost,
)
from isthmus.v1 import types_pb2
from router.client.caller import ClientGone
from router.pool.session import ANSWER_TIMEOUT_S
from tests.router.fakes import Cluster, RouterUnderTest, ask, retained
from tests.router.scripted_decode import SCRIPT

LONG = (SCRIPT * 2)[:60]


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    for name in ("d0", "d1"):
        made.add_decode(name).token_interval_s = 0.01
    made.add_prefill()
    return made


@pytest.fixture
def router(cluster: Cluster) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(cluster).meet_workers()
    yield router
    router.is_quiet()


def test_a_client_that_leaves_while_a_message_is_on_its_way_can_come_back(router: RouterUnderTest) -> None:
    call = router.call(retained(max_tokens=60))
    call.read(5)
    call.delay_s = 10.0
    router.time.run_until(lambda: call.is_telling, "a message is on its way")
    call.leave()
    num_read = len(call.result.token_ids)
    router.time.run_for(0.1)
    assert len(router.lives) == 1, "it is kept"

    again = router.resume(call.request_id, num_read)

    assert call.result.tokens + again.to_the_end().tokens == LONG
    assert isinstance(call.until_over().error, AttachedElsewhere)


def test_a_kept_request_that_nobody_resumes_runs_to_its_end(router: RouterUnderTest) -> None:
    call = router.call(retained(max_tokens=60))
    call.read(5)
    call.leave()

    assert call.until_over().error is None
    assert router.events("request.finished")[-1].fields["num_tokens"] == "60"


def test_a_kept_request_that_nobody_resumes_ends_with_its_retention(router: RouterUnderTest) -> None:
    for worker in router.cluster.decode:
        worker.max_tokens_sent = 10
    request = retained(max_tokens=60)
    request.retention_s = 2
    call = router.call(request)
    call.read(5)
    call.leave()
    left_at = router.time.now()

    call.until_over()

    assert router.time.now() - left_at == pytest.approx(2.0)
    assert router.events("request.failed")[-1].cause == "CANCELLED"


@pytest.mark.parametrize("has_it_run", [True, False], ids=["ended", "running"])
def test_when_a_cancel_is_answered_no_worker_has_the_stream(cluster: Cluster, has_it_run: bool) -> None:
    """What is kept of an ended stream is told at once, end included: it is to be forgotten all the same."""
    cluster.decode[0].keeps_ended = cluster.decode[1].keeps_ended = True
    cluster.decode[0].token_interval_s = cluster.decode[1].token_interval_s = 0.0 if has_it_run else 0.01
    home = RouterUnderTest(cluster).meet_workers()
    other = RouterUnderTest(cluster).meet_workers()
    call = home.call(retained(max_tokens=60))
    call.until_over() if has_it_run else call.read(5)

    assert other.cancel(call.request_id)

    assert [worker.find(call.request_id) for worker in cluster.decode] == [None, None]
    assert not other.cancel(call.request_id), "nobody has it"
    home.is_quiet()
    other.is_quiet()


def test_a_client_that_leaves_before_it_knows_its_request_leaves_nothing(router: RouterUnderTest) -> None:
    call = router.call(retained(max_tokens=60), delay_s=1.0)
    router.time.run_until(lambda: call.is_telling, "accepted is on its way")

    call.leave()

    assert isinstance(call.until_over().error, ClientGone)
    assert not router.lives.hand_on()


def test_a_cancel_while_accepted_is_being_told_adds_no_message(router: RouterUnderTest) -> None:
    call = router.call(ask(max_tokens=60), delay_s=0.5)
    router.time.run_until(lambda: call.is_telling, "accepted is on its way")
    (request_id,) = router.lives._by_request

    assert router.cancel(request_id)

    with pytest.raises(RequestCancelled):
        call.to_the_end()
    assert call.result.finished is None
    assert not router.cluster.prefill[0].requests


def test_a_cancel_while_it_waits_for_a_slot_is_told(cluster: Cluster) -> None:
    router = RouterUnderTest(cluster, max_streams=1).meet_workers()
    first, second = router.call(ask(max_tokens=60)), router.call(ask(max_tokens=60))
    first.read(3)
    (request_id,) = router.lives._by_request.keys() - {first.request_id}

    assert router.cancel(request_id)

    assert second.until_over().error is None
    assert second.result.end.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert first.to_the_end().tokens == LONG
    router.is_quiet()


def test_a_deadline_while_the_last_message_is_on_its_way_ends_the_call(router: RouterUnderTest) -> None:
    call = router.call(ask(max_tokens=1), timeout_s=1.0)
    call.read(1)
    call.reads = False
    router.time.run_until(lambda: call.is_telling, "finished is on its way")

    with pytest.raises(DeadlinePassed):
        call.to_the_end()


@pytest.mark.parametrize("wait_s", [0.0, 0.5])
def test_a_resume_that_gets_no_slot_leaves_the_stream_with_its_worker(cluster: Cluster, wait_s: float) -> None:
    """Refused by a full queue, or after it has waited in it."""
    for worker in cluster.decode:
        worker.token_interval_s = 0.1
    home = RouterUnderTest(cluster).meet_workers()
    call = home.call(retained(max_tokens=60))
    call.read(5)
    busy = RouterUnderTest(
        cluster, max_streams=1, max_queue=1 if wait_s == 0.0 else 5, queue_timeout_s=wait_s or 10.0
    ).meet_workers()
    others = [busy.call(ask(max_tokens=30), timeout_s=60.0) for _ in range(2 if wait_s == 0.0 else 1)]
    others[0].read(2)

    with pytest.raises(Overloaded):
        busy.resume(call.request_id, 5).to_the_end()

    assert isinstance(call.until_over().error, AttachedElsewhere)
    assert cluster.serving().find(call.request_id), "the stream goes on"
    assert home.resume(call.request_id, 5).to_the_end().tokens == LONG[5:]
    for other in others:
        assert other.until_over().result.tokens == (SCRIPT[:30] if other.error is None else b"")
    home.is_quiet()
    busy.is_quiet()


def test_a_resume_that_is_refused_leaves_the_stream_with_the_call_that_has_it(router: RouterUnderTest) -> None:
    """The client has token 0 from prefill; decode has nothing yet, so there is no stream to go on with."""
    router.cluster.prefill[0].commits = False
    call = router.call(retained(max_tokens=60))
    call.read(1)

    with pytest.raises(IndexOutOfRange):
        router.resume(call.request_id, 1).to_the_end()

    router.cluster.serving().commit(router.cluster.prefill[0].requests[0].target.transfer_id, 1)
    assert call.to_the_end().tokens == LONG


def test_of_two_that_resume_at_once_the_later_has_the_stream(router: RouterUnderTest) -> None:
    for worker in router.cluster.decode:
        worker.token_interval_s = 0.05
    call = router.call(retained(max_tokens=60))
    call.read(5)
    call.leave()
    worker = router.cluster.serving()
    first = router.resume(call.request_id, 5)
    second = router.resume(call.request_id, 3)
    router.time.run_until(lambda: len(worker.attaches) == 2, "both ask")

    assert second.to_the_end().tokens == LONG[3:]
    assert isinstance(first.until_over().error, AttachedElsewhere)


def test_who_has_the_stream_goes_on_with_it_when_a_resume_is_given_up(router: RouterUnderTest) -> None:
    for worker in router.cluster.decode:
        worker.token_interval_s = 0.05
    call = router.call(retained(max_tokens=60))
    call.read(5)
    again = router.resume(call.request_id, 0)
    router.time.run_until(lambda: router.cluster.serving().attaches, "attached there")

    again.leave()  # before the worker's answer has come

    assert call.to_the_end().tokens == LONG


@pytest.mark.parametrize("moment", ["looking", "attaching", "accepting"])
def test_who_resumes_and_leaves_at_once_does_not_end_the_stream(cluster: Cluster, moment: str) -> None:
    for worker in cluster.decode:
        worker.token_interval_s = 0.05
    home, other = RouterUnderTest(cluster).meet_workers(), RouterUnderTest(cluster).meet_workers()
    call = home.call(retained(max_tokens=60))
    call.read(5)
    worker = cluster.serving()
    again = other.resume(call.request_id, 5)
    again.reads = False
    if moment == "attaching":
        other.time.run_until(lambda: worker.attaches, "attached")
    elif moment == "accepting":
        other.time.run_until(lambda: again.is_telling, "accepted is on its way")

    again.leave()
    other.time.run_for(0.2)

    assert worker.find(call.request_id), "the stream goes on"
    assert other.resume(call.request_id, 5).to_the_end().tokens == LONG[5:]
    for router in (home, other):
        router.is_quiet()


@pytest.mark.parametrize("breaks_s", [0.0, 0.05])
def test_a_prefill_worker_lost_after_decode_has_claimed_is_not_missed(router: RouterUnderTest, breaks_s: float) -> None:
    """Before or after decode has said so."""
    router.cluster.prefill[0].breaks_s = breaks_s
    for worker in router.cluster.decode:
        worker.tokens_per_step = 1

    result = router.generate(ask(max_tokens=60))

    assert result.tokens == LONG
    assert len(router.cluster.prefill[0].requests) == 1
    assert sum(len(worker.reserves) for worker in router.cluster.decode) == 1


def test_a_rearm_that_is_not_answered_loses_the_decode_worker(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].fail = lambda call: WorkerLost("crashed") if call == 1 else None
    for worker in router.cluster.decode:
        worker.answers_rearm = False
    began_at = router.time.now()

    result = router.generate(ask(max_tokens=10))

    assert result.tokens == SCRIPT[:10]
    assert ANSWER_TIMEOUT_S < router.time.now() - began_at < ANSWER_TIMEOUT_S + 1.0
    assert [len(worker.rearms) for worker in router.cluster.decode if worker.rearms] == [1]
    assert sum(len(worker.reserves) for worker in router.cluster.decode) == 2


def lose_twice(router: RouterUnderTest, num_calls: int) -> None:
    """The prefill worker is lost with all its prompts, twice: each of them is suspected."""
    worker = router.cluster.prefill[0]
    worker.holds = True
    for num_lost in (1, 2):
        router.time.run_until(lambda n=num_lost: len(worker.requests) >= n * num_calls, f"{num_lost}. round")
        router.time.run_for(0.01)
        for run in list(worker.runs):
            worker.lose(run)


def test_suspects_are_computed_one_by_one_until_each_has_a_token(router: RouterUnderTest) -> None:
    calls = [router.call(ask(f"prompt {i}", max_tokens=20)) for i in range(3)]
    lose_twice(router, 3)
    worker = router.cluster.prefill[0]
    num_before = len(worker.requests)
    router.time.run_until(lambda: len(worker.requests) > num_before, "the first suspect is tried")
    router.time.run_for(0.5)
    assert len(worker.requests) == num_before + 1, "alone"
    assert router.admission.quarantine.num_waiting == 2

    worker.release()

    assert [call.to_the_end().tokens for call in calls] == [SCRIPT[:20]] * 3
    assert worker.requests[num_before].request.prompt_token_ids != worker.requests[-1].request.prompt_token_ids


@pytest.mark.parametrize("end", ["leave", "cancel", "deadline"])
def test_a_suspect_that_ends_early_leaves_the_quarantine(router: RouterUnderTest, end: str) -> None:
    calls = [router.call(ask(f"prompt {i}", max_tokens=20), timeout_s=8.0 + i * 20) for i in range(2)]
    lose_twice(router, 2)
    worker = router.cluster.prefill[0]
    num_before = len(worker.requests)
    router.time.run_until(lambda: len(worker.requests) > num_before, "the first suspect is tried")
    assert not router.admission.quarantine.num_free

    if end == "leave":
        calls[0].leave()
    elif end == "cancel":
        router.cancel(calls[0].request_id)
    calls[0].until_over()
    router.time.run_until(lambda: len(worker.requests) > num_before + 1, "the second one is tried")
    worker.release()

    assert calls[1].to_the_end().tokens == SCRIPT[:20]


def test_a_router_without_workers_for_a_moment_meets_them_before_it_says_that_a_stream_is_gone(
    cluster: Cluster,
) -> None:
    home = RouterUnderTest(cluster).meet_workers()
    call = home.call(retained(max_tokens=60))
    call.read(5)
    other = RouterUnderTest(cluster)  # it has met nobody yet

    assert other.resume(call.request_id, 5).to_the_end().tokens == LONG[5:]
    home.is_quiet()
    other.is_quiet()


def test_a_blip_while_a_worker_is_asked_frees_what_it_may_have_set_aside(router: RouterUnderTest) -> None:
    first = min(router.cluster.decode, key=lambda worker: worker.incarnation)
    first.keeps_streams = True
    first.answer_delays_s = [0.05]
    call = router.call(ask(max_tokens=60))
    router.time.run_until(lambda: first.streams, "set aside there")

    first.lose_sessions()

    assert call.to_the_end().tokens == LONG
    assert not first.streams
