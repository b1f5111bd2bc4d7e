"""A request's life over scripted workers, in virtual time."""

from collections.abc import Iterator

import pytest

from isthmus.errors import (
    IsthmusError,
    NoFreeBlocks,
    NonFiniteLogits,
    Overloaded,
    RequestKillsWorkers,
    SlowClient,
    TransferIncomplete,
    WorkerLost,
)
from isthmus.v1 import decode_pb2, types_pb2
from router.client.caller import ClientGone
from router.life.losses import MAX_FRUITLESS
from router.pool.session import FIRST_BACKOFF_S
from router.pool.worker_pool import SUSPECT_S
from tests.router.fakes import Cluster, RouterUnderTest, ask
from tests.router.scripted_decode import EOS, SCRIPT
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


def test_streams_every_token_once_and_accounts_for_it(router: RouterUnderTest) -> None:
    result = router.generate(ask("Hello", max_tokens=20, seed=7))

    assert result.tokens == SCRIPT[:20]
    assert result.text == SCRIPT[:20].decode()
    assert result.start.seed == 7
    finished = result.end
    assert finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.num_prompt_tokens, finished.usage.num_generated_tokens) == (5, 20)
    assert finished.usage.num_cached_tokens == 5
    assert (finished.workers.prefill, finished.workers.decode, finished.num_attempts) == ("p0", "d0", 1)
    assert (finished.timings.transfer_bytes, finished.timings.prefill_ms) == (4096, 3.0)
    # A reservation and a Prefill call take two messages each, then decode's first token two more.
    assert finished.timings.queue_ms == pytest.approx(2 * LATENCY_S * 1000)
    assert finished.timings.ttft_ms == pytest.approx(4 * LATENCY_S * 1000)
    assert finished.timings.total_ms == pytest.approx(5 * LATENCY_S * 1000)
    assert not router.cluster.decode[0].cancels


def test_token_zero_reaches_the_client_before_decode_has_anything(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].commits = False
    call = router.call(ask(max_tokens=5))

    assert call.read(1).tokens == SCRIPT[:1]
    assert not router.cluster.serving().find(call.request_id), "decode has sent nothing"
    call.leave()


def test_max_tokens_one_needs_no_decode(router: RouterUnderTest) -> None:
    result = router.generate(ask(max_tokens=1))

    assert result.tokens == SCRIPT[:1]
    assert result.end.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert result.end.workers.decode == ""
    assert not router.cluster.decode[0].cancels


def test_eos_at_token_zero_ends_the_request(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].token = lambda request, index: types_pb2.Token(id=EOS)

    result = router.generate(ask(max_tokens=9))

    assert (result.token_ids, result.text) == ([EOS], "")
    assert result.end.finish_reason == types_pb2.FINISH_REASON_STOP


def test_eos_later_is_counted_but_is_no_text(router: RouterUnderTest) -> None:
    def token(request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
        return types_pb2.Token(id=EOS if index == 3 else SCRIPT[index])

    router.cluster.decode[0].token = token
    router.cluster.prefill[0].token = token

    result = router.generate(ask(max_tokens=9))

    assert (result.text, result.token_ids[-1]) == ("The", EOS)
    assert result.end.usage.num_generated_tokens == 4


@pytest.mark.parametrize(("include_stop", "text"), [(False, "The quick "), (True, "The quick brown")])
def test_stop_string_across_tokens_ends_the_request(router: RouterUnderTest, include_stop: bool, text: str) -> None:
    router.cluster.decode[0].token_interval_s = 0.001

    result = router.generate(ask(max_tokens=500, stop=["dog", "brown"], include_stop=include_stop))

    assert result.text == text
    assert result.tokens == b"The quick brown"
    assert result.end.finish_reason == types_pb2.FINISH_REASON_STOP
    router.is_quiet()
    (cancel,) = router.cluster.decode[0].cancels
    assert cancel.finish_reason == types_pb2.FINISH_REASON_STOP


def test_stop_string_inside_a_step_of_many_tokens(router: RouterUnderTest) -> None:
    router.cluster.decode[0].tokens_per_step = 32

    result = router.generate(ask(max_tokens=64, stop=["quick"]))

    assert (result.text, result.tokens) == ("The ", b"The quick")


def test_text_does_not_depend_on_grouping(router: RouterUnderTest) -> None:
    texts: set[str] = set()
    for tokens_per_step in (1, 2, 7, 100):
        router.cluster.decode[0].tokens_per_step = tokens_per_step
        texts.add(router.generate(ask(max_tokens=77, stop=["dogs"])).text)
    assert texts == {(SCRIPT * 2)[:77].decode()}


@pytest.mark.parametrize("phase", ["accepting", "reserving", "prefilling", "filling", "decoding"])
def test_client_gone_in_any_phase_frees_everything(router: RouterUnderTest, phase: str) -> None:
    decode, prefill = router.cluster.decode[0], router.cluster.prefill[0]
    decode.answers_reserve = phase != "reserving"
    prefill.holds = phase == "prefilling"
    prefill.commits = phase != "filling"
    decode.max_tokens_sent = 4
    call = router.call(ask(max_tokens=50), delay_s=0.01 if phase == "accepting" else 0.0)
    if phase == "accepting":
        router.time.run_until(lambda: call.is_telling, "accepted is on its way")
    else:
        router.time.run_until(lambda: len(decode.reserves) == 1, "reserved")
    if phase in ("prefilling", "filling"):
        router.time.run_until(lambda: len(prefill.requests) == 1, "prefilling")
    if phase == "decoding":
        call.read(3)

    call.leave()

    router.is_quiet()
    router.time.run_for(2 * LATENCY_S)
    assert isinstance(call.until_over().error, ClientGone)
    assert [cancel.attach.counter for cancel in decode.cancels] == ([] if phase == "accepting" else [1])
    if phase == "prefilling":
        assert prefill.num_cancelled == 1
    decode.answers_reserve = True
    decode.max_tokens_sent = None
    prefill.commits = True
    prefill.holds = False
    assert router.generate(ask(max_tokens=3)).text == "The"


def test_cancel_call_ends_the_stream_with_what_it_had(router: RouterUnderTest) -> None:
    router.cluster.decode[0].max_tokens_sent = 4
    call = router.call(ask(max_tokens=50))
    call.read(4)

    assert router.cancel(call.request_id)
    last = call.to_the_end().end

    assert last.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert last.usage.num_generated_tokens == 4
    router.is_quiet()
    assert len(router.cluster.decode[0].cancels) == 1
    assert not router.cancel(call.request_id)


@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
def test_deadline_frees_everything(router: RouterUnderTest, phase: str) -> None:
    router.cluster.prefill[0].holds = phase == "prefilling"
    router.cluster.decode[0].max_tokens_sent = 4
    began_at = router.time.now()

    with pytest.raises(IsthmusError) as refusal:
        router.generate(ask(max_tokens=50), timeout_s=0.4)

    assert refusal.value.reason == "DEADLINE_PASSED"
    assert router.time.now() == pytest.approx(began_at + 0.4)
    router.is_quiet()
    assert 399 <= router.cluster.decode[0].reserves[0].request.timeout_ms <= 400


def test_prefill_lost_before_its_token_is_repeated_elsewhere(router: RouterUnderTest) -> None:
    spare = router.cluster.add_prefill("p1")
    router.time.run_for(0.3)
    for worker in router.cluster.prefill:
        worker.fail = lambda call: WorkerLost("crashed") if _total_calls(router) == 1 else None

    result = router.generate(ask(max_tokens=6))

    assert result.tokens == SCRIPT[:6]
    assert result.end.num_attempts == 2
    assert [rearm.attempt for rearm in router.cluster.decode[0].rearms] == [2]
    first, second = sorted((router.cluster.prefill[0].requests[0], spare.requests[0]), key=lambda r: r.target.attempt)
    assert (first.target.attempt, second.target.attempt) == (1, 2)
    assert second.target.missing[0].layer == 1, "what is missing now, in the decode worker's words"


def test_a_request_that_kills_two_prefill_workers_ends(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].crash = lambda call: WorkerLost("crashed")
    began_at = router.time.now()

    with pytest.raises(RequestKillsWorkers, match="2 prefill workers"):
        router.generate(ask(max_tokens=6))

    assert len(router.cluster.prefill[0].requests) == 2
    assert router.time.now() - began_at > SUSPECT_S, "for so long the worker was suspect, and there was no other"


def test_error_of_the_request_itself_is_not_repeated(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].fail = lambda call: NonFiniteLogits("NaN")

    with pytest.raises(NonFiniteLogits):
        router.generate(ask(max_tokens=6))

    assert len(router.cluster.prefill[0].requests) == 1


def test_failed_transfer_is_repeated_and_token_zero_is_not(router: RouterUnderTest) -> None:
    prefill, decode = router.cluster.prefill[0], router.cluster.decode[0]
    prefill.commits = False
    call = router.call(ask(max_tokens=6))
    call.read(1)
    prefill.commits = True

    decode.fail_transfer(prefill.requests[0].target.transfer_id)
    result = call.to_the_end()

    assert result.tokens == SCRIPT[:6]
    assert result.end.num_attempts == 2


def test_a_transfer_that_never_succeeds_ends_the_request(router: RouterUnderTest) -> None:
    prefill = router.cluster.prefill[0]
    prefill.commits = False
    prefill.done.acked = False
    prefill.done.failure = "no ack"

    with pytest.raises(TransferIncomplete):
        router.generate(ask(max_tokens=6))

    assert len(prefill.requests) == MAX_FRUITLESS


def test_a_stop_string_in_token_zero_ends_the_request_whatever_becomes_of_its_transfer(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].commits = False
    router.cluster.prefill[0].done.acked = False

    result = router.generate(ask(max_tokens=6, stop=["T"]))

    assert (result.text, result.tokens, result.end.num_attempts) == ("", b"T", 1)
    assert result.end.finish_reason == types_pb2.FINISH_REASON_STOP
    assert len(router.cluster.prefill[0].requests) == 1


def test_decode_lost_before_its_tokens_is_repeated_elsewhere(router: RouterUnderTest) -> None:
    router.cluster.prefill[0].commits = False
    call = router.call(ask(max_tokens=6))
    call.read(1)
    spare = router.cluster.add_decode("d1")
    router.meet_workers()
    router.cluster.prefill[0].commits = True

    router.cluster.decode[0].go_down()
    result = call.to_the_end()

    assert result.tokens == SCRIPT[:6]
    assert result.end.workers.decode == spare.name


def test_session_comes_back_after_a_loss(router: RouterUnderTest) -> None:
    decode = router.cluster.decode[0]
    decode.go_down()
    router.time.run_until(lambda: not router.pool.usable_decode(router.time.now()), "lost")
    decode.is_up = True

    router.meet_workers()
    assert decode.hellos[-1].router_incarnation == router.pool.incarnation
    assert router.generate(ask(max_tokens=3)).text == "The"


def test_a_worker_that_stays_away_is_tried_ever_less_often(router: RouterUnderTest) -> None:
    decode = router.cluster.decode[0]
    decode.go_down()
    router.time.run_for(10 * FIRST_BACKOFF_S)
    decode.is_up = True
    came_back_at = router.time.now()

    router.meet_workers()

    assert FIRST_BACKOFF_S < router.time.now() - came_back_at < 1.0


def test_differing_copies_are_data_loss(router: RouterUnderTest) -> None:
    router.cluster.decode[0].token = lambda request, index: types_pb2.Token(id=SCRIPT[index] ^ 1)

    with pytest.raises(IsthmusError) as refusal:
        router.generate(ask(max_tokens=6))

    assert refusal.value.grpc_status == "DATA_LOSS"


def test_slow_client_ends_alone(cluster: Cluster) -> None:
    cluster.decode[0].token_interval_s = 0.001
    router = RouterUnderTest(cluster, max_buffered_tokens=100).meet_workers()
    slow = router.call(ask(max_tokens=4000), delay_s=0.5)
    others = [router.call(ask(max_tokens=200)) for _ in range(4)]

    results = [other.to_the_end() for other in others]

    assert all(result.tokens == (SCRIPT * 5)[:200] for result in results)
    with pytest.raises(SlowClient):
        slow.to_the_end()
    router.is_quiet()
    assert len(cluster.decode[0].cancels) == 1


def test_full_decode_workers_are_asked_in_turn(router: RouterUnderTest) -> None:
    spare = router.cluster.add_decode("d1")
    router.meet_workers()
    for worker in router.cluster.decode:
        worker.refuse = lambda reserve: NoFreeBlocks("full") if len(_reserves(router)) == 1 else None

    result = router.generate(ask(max_tokens=3))

    assert result.text == "The"
    assert len(_reserves(router)) == 2
    assert result.end.num_attempts == 1
    assert spare.streams == {}


def test_waits_for_room_in_order(router: RouterUnderTest) -> None:
    decode = router.cluster.decode[0]
    decode.refuse = lambda reserve: NoFreeBlocks("full")
    calls = [router.call(ask(f"number {i}", max_tokens=3)) for i in range(3)]
    router.time.run_until(lambda: len(decode.reserves) >= 4, "refused")
    num_refused = len(decode.reserves)

    decode.refuse = lambda reserve: None
    results = [call.to_the_end() for call in calls]

    assert all(result.text == "The" for result in results)
    served = [bytes(reserve.request.prompt_token_ids).decode() for reserve in decode.reserves[num_refused:]]
    assert served == ["number 0", "number 1", "number 2"]


def test_full_for_too_long_is_an_error_with_retry_info(cluster: Cluster) -> None:
    cluster.decode[0].refuse = lambda reserve: NoFreeBlocks("full")
    router = RouterUnderTest(cluster, queue_timeout_s=0.4).meet_workers()
    began_at = router.time.now()

    with pytest.raises(NoFreeBlocks) as refusal:
        router.generate(ask(max_tokens=3))

    assert refusal.value.retry_after_s
    assert router.time.now() - began_at == pytest.approx(0.4, abs=0.01)
    router.is_quiet()


def test_queue_over_its_bound_is_refused_at_once(cluster: Cluster) -> None:
    cluster.prefill[0].holds = True
    router = RouterUnderTest(cluster, max_streams=2, max_queue=3).meet_workers()
    calls = [router.call(ask(max_tokens=3)) for _ in range(5)]
    router.time.run_until(lambda: router.admission.num_queued == 3, "queued")
    came_at = router.time.now()

    with pytest.raises(Overloaded) as refusal:
        router.generate(ask(max_tokens=3))

    assert refusal.value.retry_after_s
    assert router.time.now() == came_at
    cluster.prefill[0].release()
    assert {call.to_the_end().text for call in calls} == {"The"}
    router.is_quiet()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_no_worker_of_a_role_is_unavailable_after_a_bounded_wait(cluster: Cluster, role: str) -> None:
    router = RouterUnderTest(cluster, queue_timeout_s=0.5).meet_workers()
    cluster.kill(cluster.prefill[0] if role == "prefill" else cluster.decode[0])
    workers = router.pool.prefill if role == "prefill" else router.pool.decode
    router.time.run_until(lambda: not workers, "gone")
    began_at = router.time.now()

    with pytest.raises(IsthmusError) as refusal:
        router.generate(ask(max_tokens=3))

    assert refusal.value.reason == "WORKERS_UNAVAILABLE"
    assert refusal.value.retry_after_s
    assert router.time.now() - began_at == pytest.approx(0.5)
    router.is_quiet()


def test_many_at_once_with_cancels_leave_nothing(router: RouterUnderTest) -> None:
    router.cluster.decode[0].token_interval_s = 0.001
    calls = [router.call(ask(f"prompt {i}", max_tokens=20)) for i in range(60)]
    for i, call in enumerate(calls):
        if i % 3 == 0:
            call.read(1 + i % 7)
            call.leave()

    for i, call in enumerate(calls):
        if i % 3:
            assert call.to_the_end().tokens == SCRIPT[:20]
        else:
            assert call.until_over().error is None or isinstance(call.error, ClientGone)
    router.is_quiet()


def _total_calls(router: RouterUnderTest) -> int:
    return sum(len(worker.requests) for worker in router.cluster.prefill)


def _reserves(router: RouterUnderTest) -> list[decode_pb2.Reserve]:
    return [reserve for worker in router.cluster.decode for reserve in worker.reserves]
