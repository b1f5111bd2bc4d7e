"""What dies around a request, and what its client sees of it: over scripted workers, in virtual time."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from isthmus.errors import AttachedElsewhere, Draining, IsthmusError, RequestKillsWorkers, StreamGone
from isthmus.v1 import decode_pb2, inference_pb2, types_pb2
from tests.router.fakes import Cluster, RouterUnderTest, ScriptedCaller, ask, no_room, retained
from tests.router.scripted_decode import SCRIPT, ScriptedDecode

LONG = (SCRIPT * 2)[:60]


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    for name in ("d0", "d1"):
        made.add_decode(name)
    made.add_prefill()
    return made


@pytest.fixture
def router(cluster: Cluster) -> Iterator[RouterUnderTest]:
    router = RouterUnderTest(cluster).meet_workers()
    yield router
    router.is_quiet()


def begin(
    router: RouterUnderTest, request: inference_pb2.GenerateRequest, num_tokens: int, *, interval_s: float = 0.01
) -> ScriptedCaller:
    """A call that has its first tokens; decode workers take `interval_s` for a token."""
    for worker in router.cluster.decode:
        worker.token_interval_s = interval_s
    call = router.call(request)
    call.read(num_tokens)
    return call


def test_a_lost_decode_worker_is_replaced_at_the_next_token(router: RouterUnderTest) -> None:
    call = begin(router, ask(max_tokens=60), 5)
    lost = router.cluster.serving()
    spare = router.cluster.other(lost)
    router.cluster.kill(lost)

    result = call.to_the_end()

    assert result.tokens == LONG
    assert result.end.num_attempts == 2
    assert bytes(spare.reserves[-1].request.emitted_token_ids) == LONG[:5]


def test_a_connection_that_blips_goes_on_where_it_was(router: RouterUnderTest) -> None:
    for worker in router.cluster.decode:
        worker.keeps_streams = True
    call = begin(router, ask(max_tokens=60), 5)
    worker = router.cluster.serving()

    worker.lose_sessions()

    result = call.to_the_end()
    assert result.tokens == LONG
    assert result.end.num_attempts == 1
    assert [(cursor.request_id, cursor.next_index) for cursor in worker.hellos[-1].streams] == [(call.request_id, 5)]
    assert len(worker.reserves) == 1


def test_a_request_that_kills_two_decode_workers_ends(router: RouterUnderTest) -> None:
    def kills(worker: ScriptedDecode, request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
        if index == 7:
            worker.go_down()
        return types_pb2.Token(id=SCRIPT[index])

    for worker in router.cluster.decode:
        worker.token = partial(kills, worker)
        worker.token_interval_s = 0.01

    with pytest.raises(RequestKillsWorkers, match="2 decode workers"):
        router.generate(ask(max_tokens=20))


def test_a_leaving_decode_worker_hands_its_stream_to_another(router: RouterUnderTest) -> None:
    call = begin(router, ask(max_tokens=60), 5)
    first = router.cluster.serving()
    other = router.cluster.other(first)

    first.leave()
    result = call.to_the_end()

    assert result.tokens == LONG
    assert result.end.num_attempts == 1
    assert result.end.workers.decode == other.name
    assert other.reserves[-1].moves
    assert len(router.cluster.prefill[0].requests) == 1, "nothing is computed again"


def test_a_reservation_that_is_answered_too_late_is_not_taken_for_the_next(router: RouterUnderTest) -> None:
    call = begin(router, ask(max_tokens=60), 5, interval_s=0.03)
    first = router.cluster.serving()
    other = router.cluster.other(first)
    other.answer_delays_s = [0.35, 0.2]

    first.leave()
    result = call.to_the_end()

    assert result.tokens == LONG
    (moved,) = router.events("request.moved")
    assert moved.transfer_id == first.moves[-1].target.transfer_id
    assert first.moves[-1].target.counter == other.reserves[-1].attach.counter
    assert [reserve.attach.counter for reserve in other.reserves] == [2, 3], "the first one's end is not the second's"


def test_a_move_whose_target_is_lost_is_tried_again(router: RouterUnderTest) -> None:
    call = begin(router, ask(max_tokens=60), 5, interval_s=0.03)
    first = router.cluster.serving()
    other = router.cluster.other(first)
    first.moves_streams = False
    first.leave()
    router.time.run_until(lambda: first.moves, "asked to move")

    other.lose_sessions()  # it does not keep the reservation
    first.moves_streams = True
    result = call.to_the_end()

    assert result.tokens == LONG
    assert len(router.events("request.move_failed")) == 1
    assert result.end.workers.decode == other.name
    assert result.end.num_attempts == 1


def test_a_stream_does_not_leave_because_another_worker_does(router: RouterUnderTest) -> None:
    def leaves(reserve: decode_pb2.Reserve) -> IsthmusError:
        return Draining("leaving")

    first = min(router.cluster.decode, key=lambda worker: worker.incarnation)
    first.refuse = leaves
    first.is_leaving = True
    for worker in router.cluster.decode:
        worker.token_interval_s = 0.02

    calls = [router.call(ask(max_tokens=60)) for _ in range(4)]
    results = [call.to_the_end() for call in calls]

    assert [result.tokens for result in results] == [LONG] * 4
    assert first.reserves, "it was asked first"
    assert not router.events("request.moved")


def test_a_stream_resumed_at_a_worker_that_leaves_moves(router: RouterUnderTest) -> None:
    call = begin(router, retained(max_tokens=60), 3, interval_s=0.03)
    first = router.cluster.serving()
    other = router.cluster.other(first)
    other.refuse = no_room
    first.leave()
    router.time.run_until(lambda: any(reserve.moves for reserve in other.reserves), "asked, and refused")
    other.refuse = lambda reserve: None

    result = router.resume(call.request_id, 0).to_the_end()

    assert result.tokens == LONG
    assert result.end.workers.decode == other.name


def test_a_stream_attached_before_it_was_filled_is_placed_anew(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].commits = False
    call = router.call(retained(max_tokens=60))
    call.read(1)
    router.cluster.prefill[0].commits = True

    result = router.resume(call.request_id, 0).to_the_end()

    assert result.tokens == LONG
    assert result.end.num_attempts == 2
    with pytest.raises(AttachedElsewhere):
        call.to_the_end()


def test_nowhere_to_go_the_stream_stays(router: RouterUnderTest) -> None:
    call = begin(router, ask(max_tokens=60), 5)
    first = router.cluster.serving()
    router.cluster.other(first).refuse = lambda reserve: IsthmusError("no")

    first.leave()

    assert call.to_the_end().tokens == LONG


def test_resumed_at_any_router_from_any_index(router: RouterUnderTest, cluster: Cluster) -> None:
    call = begin(router, retained(max_tokens=60), 5, interval_s=0.02)
    other = RouterUnderTest(cluster).meet_workers()

    result = other.resume(call.request_id, 3).to_the_end()

    assert result.first_index == 3
    assert result.tokens == LONG[3:]
    assert result.end.usage.num_generated_tokens == 60
    with pytest.raises(AttachedElsewhere):
        call.to_the_end()
    other.is_quiet()


def test_resumed_at_the_router_that_has_it(router: RouterUnderTest) -> None:
    call = begin(router, retained(max_tokens=60), 5, interval_s=0.02)

    assert router.resume(call.request_id, 0).to_the_end().tokens == LONG
    with pytest.raises(AttachedElsewhere):
        call.to_the_end()


def test_a_kept_stream_outlives_its_client_and_its_decode_worker(router: RouterUnderTest) -> None:
    call = begin(router, retained(max_tokens=60), 5, interval_s=0.03)
    call.leave()
    lost = router.cluster.serving()
    spare = router.cluster.other(lost)
    router.cluster.kill(lost)
    router.time.run_until(lambda: (spare.find(call.request_id) or 0) > 8, "running again")

    assert router.resume(call.request_id, 5).to_the_end().tokens == LONG[5:]


def test_a_stream_that_is_not_kept_ends_with_its_client(router: RouterUnderTest) -> None:
    call = begin(router, ask(max_tokens=60), 3, interval_s=0.02)
    call.leave()
    router.is_quiet()

    with pytest.raises(StreamGone):
        router.resume(call.request_id, 0).to_the_end()


def test_cancel_reaches_a_stream_of_another_router(router: RouterUnderTest, cluster: Cluster) -> None:
    call = begin(router, retained(max_tokens=60), 3, interval_s=0.02)
    other = RouterUnderTest(cluster).meet_workers()

    assert other.cancel(call.request_id)

    with pytest.raises(AttachedElsewhere):
        call.to_the_end()
    router.time.run_until(lambda: not any(worker.streams for worker in cluster.decode), "nothing runs")
    other.is_quiet()


@pytest.mark.parametrize("num_emitted", [1, 7, 59])
def test_continued_from_its_tokens(router: RouterUnderTest, num_emitted: int) -> None:
    request = ask(max_tokens=60, seed=3)
    request.emitted_token_ids.extend(LONG[:num_emitted])

    result = router.generate(request)

    assert result.first_index == num_emitted
    assert result.tokens == LONG[num_emitted:]
    assert result.text == LONG[num_emitted:].decode()


def test_continued_from_all_its_tokens_only_the_end_was_missing(router: RouterUnderTest) -> None:
    request = ask(max_tokens=60, seed=3)
    request.emitted_token_ids.extend(LONG)

    result = router.generate(request)

    assert (result.start.num_prompt_tokens, result.token_ids) == (5, [])
    assert result.end.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert not router.cluster.prefill[0].requests


@pytest.mark.parametrize(
    ("emitted", "sampling", "field"),
    [
        (LONG, {"max_tokens": 59, "seed": 1}, "emitted_token_ids"),
        (LONG[:3], {"max_tokens": 10, "stop": ["h"], "seed": 1}, "emitted_token_ids"),
        ([-1], {"max_tokens": 10, "seed": 1}, "emitted_token_ids"),
        (LONG[:3], {"max_tokens": 10}, "sampling.seed"),
    ],
)
def test_emitted_tokens_that_cannot_be(
    router: RouterUnderTest, emitted: Any, sampling: dict[str, Any], field: str
) -> None:
    request = ask(**sampling)
    request.emitted_token_ids.extend(emitted)
    with pytest.raises(IsthmusError) as refusal:
        router.generate(request)
    assert refusal.value.grpc_status == "INVALID_ARGUMENT"
    assert refusal.value.violations[0].field == field


def test_a_draining_router_hands_kept_streams_on(router: RouterUnderTest, cluster: Cluster) -> None:
    for worker in cluster.decode:
        worker.keeps_streams = True
    call = begin(router, retained(max_tokens=60), 5, interval_s=0.02)
    tokens = call.result.tokens

    router.lives.hand_on()
    with pytest.raises(Draining):
        call.to_the_end()
    assert router.lives.hand_on() == 0

    other = RouterUnderTest(cluster).meet_workers()
    more = other.resume(call.request_id, 5).to_the_end()
    assert tokens[:5] + more.tokens == LONG
    other.is_quiet()
