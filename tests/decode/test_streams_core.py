"""A worker's streams as cores in virtual time: claims, cancels in every phase, ends and tombstones."""

from dataclasses import replace

import pytest

from decode_service.core import TOMBSTONE_SLACK_S
from isthmus.types import Token
from isthmus.v1 import decode_pb2, types_pb2
from kv_transfer.receiver_events import ClaimedTransfer
from tests.decode.core_world import FILL_TIMEOUT_S, RETAIN, CoreWorld, begin_move, expected, request

ERROR = types_pb2.FINISH_REASON_ERROR
ENDED_AS_CANCELLED = types_pb2.FINISH_REASON_CANCELLED


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["one by one", "ahead"])
def test_a_stream_is_reserved_claimed_decoded_and_ended_in_this_order(runs_ahead: bool) -> None:
    world = CoreWorld(runs_ahead=runs_ahead)
    router = world.router()
    router.reserve(request())
    reserved = router.last("reserved")
    assert (reserved.request_id, reserved.zmq_endpoint, reserved.attempt) == ("a", "tcp://here", 1)
    assert {(part.first_token, part.num_tokens) for part in reserved.missing} == {(0, 20)}
    assert world.report.streams == set()
    world.claim(request())
    assert world.report.streams == {"a"}
    assert router.kinds() == ["step"]
    world.run()
    assert router.kinds() == ["step"] * 7 + ["ended"]
    assert router.tokens() == expected(request())
    assert world.report.streams == set()
    assert world.receiver.released == [reserved.transfer_id]
    assert world.events() == ["stream.reserved", "stream.joined", "stream.ended"]
    world.check_nothing_left()


def test_the_claim_of_a_stream_whose_tokens_the_router_has_is_told_by_an_empty_part() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(replace(request(), emitted_token_ids=tuple(expected(request())[:3])))
    (part,) = router.last("step").streams
    assert (part.index, len(part.tokens)) == (3, 0)
    world.run()
    assert router.tokens() == expected(request())[3:]
    assert "stream.replayed" in world.events()


def test_a_claim_that_ends_the_request_ends_the_stream_without_a_step() -> None:
    world = CoreWorld()
    router = world.router()
    asked = request(max_tokens=3)
    router.reserve(asked, moves=True)
    world.claim(asked, num_tokens=3)
    assert router.kinds() == ["reserved", "step", "ended"]
    assert router.tokens() == expected(asked)
    world.run()
    assert world.engine.decoder.num_steps == 0
    world.check_nothing_left()


def test_a_claim_of_a_transfer_that_is_not_being_filled_is_dropped() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request())
    router.read()
    transfer_id = world.stream().transfer_id
    world.run()
    router.read()
    for name in (transfer_id, "unknown"):
        world.core.streams.claimed(ClaimedTransfer(name, "a", (Token(5),)), world.now)
    assert router.read() == []


def test_a_cached_prefix_is_not_asked_for_again() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request(num_prompt_tokens=40))
    world.run()
    router.read()
    router.reserve(replace(request(num_prompt_tokens=40), request_id="again"))
    reserved = router.last("reserved")
    assert reserved.num_cached_tokens == 32
    assert {(part.first_token, part.num_tokens) for part in reserved.missing} == {(32, 8)}


def test_a_failed_attempt_leaves_the_reservation_to_another_one() -> None:
    world = CoreWorld()
    router = world.router()
    router.reserve(request())
    world.fail("a", is_ended=False)
    failed = router.last("transfer_failed")
    assert (failed.reason, failed.attempt) == ("gone", 1)
    stream = world.stream()
    world.receiver.missing = stream.missing[1:]
    rearm = decode_pb2.Rearm(request_id="a", transfer_id=stream.transfer_id, attempt=2, attach=router.key())
    router.say(rearm=rearm)
    rearmed = router.last("rearmed")
    assert (rearmed.attempt, len(rearmed.missing)) == (2, len(failed.missing) - 1)
    rearm.attempt = 1
    router.say(rearm=rearm)
    assert router.last("refused").reason == "STALE_OWNER"
    world.claim(request())
    world.run()
    assert router.tokens() == expected(request())


@pytest.mark.parametrize("finished", [False, True])
def test_a_transfer_that_ended_gives_everything_back(finished: bool) -> None:
    world = CoreWorld()
    router = world.router()
    router.reserve(request())
    router.read()
    world.fail("a", is_ended=True, finished=finished)
    assert router.kinds() == ([] if finished else ["transfer_failed"])
    world.check_nothing_left()
    router.reserve(request())
    assert router.last("refused").reason == "CANCELLED"


def test_a_cancel_before_the_reservation_refuses_it_until_the_tombstone_is_gone() -> None:
    world = CoreWorld()
    router = world.router()
    router.cancel("a", counter=2)
    for counter, reason in ((1, "CANCELLED"), (2, "CANCELLED")):
        router.reserve(request(), counter)
        assert router.last("refused").reason == reason
    router.reserve(request(), counter=3)
    assert router.last("reserved").counter == 3

    router.cancel("b")
    world.advance(FILL_TIMEOUT_S + TOMBSTONE_SLACK_S - 0.1)
    router.reserve(request("b"))
    assert router.last("refused").reason == "CANCELLED"
    world.advance(0.2)
    router.reserve(request("b"))
    assert router.last("reserved").request_id == "b"


def test_a_cancel_while_it_fills_closes_the_receiver_first() -> None:
    world = CoreWorld()
    router = world.router()
    router.reserve(request())
    transfer_id = world.stream().transfer_id
    router.cancel("a")
    assert router.last("ended").finish_reason == ENDED_AS_CANCELLED
    assert world.receiver.cancelled == {transfer_id: "cancelled"}
    world.check_nothing_left()


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["one by one", "ahead"])
def test_a_cancel_while_it_runs_ends_it_before_the_next_step(runs_ahead: bool) -> None:
    world = CoreWorld(runs_ahead=runs_ahead)
    router = world.router()
    router.start(request())
    world.step(3)
    router.cancel("a")
    num_steps = world.engine.decoder.num_steps
    world.run()
    ended = router.last("ended")
    assert ended.finish_reason == ENDED_AS_CANCELLED
    assert ended.num_tokens == len(router.tokens())
    assert world.engine.decoder.num_steps == num_steps
    world.check_nothing_left()


def test_a_cancel_of_a_stream_that_has_just_ended_in_the_step_loop_changes_its_end_no_more() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request(), **RETAIN)
    while world.turn():
        pass
    router.cancel("a")
    world.run()
    ended = router.last("ended")
    assert ended.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert router.tokens() == expected(request())
    assert world.core.streams.table.get("a") is None, "it is not kept for a router that cancelled it"


def test_a_cancel_while_its_blocks_leave_stops_them_and_keeps_them_until_the_sender_is_done() -> None:
    world = CoreWorld()
    router = world.router()
    begin_move(world, router)
    router.cancel("a")
    assert router.last("ended").finish_reason == ENDED_AS_CANCELLED
    assert world.sender.moves[0].aborted == "cancelled"
    assert world.engine.pool.counts().draining > 0
    world.finish_move("cancelled")
    assert router.read() == []
    world.check_nothing_left()


def test_a_cancel_of_a_kept_stream_forgets_it() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request(), **RETAIN)
    world.run()
    assert world.report.streams == {"a"}
    router.cancel("a")
    assert world.core.streams.table.get("a") is None
    assert world.report.streams == set()


def test_a_stale_cancel_is_noted_and_ignored() -> None:
    world = CoreWorld()
    router = world.router()
    other = world.router("other")
    router.start(request())
    other.attach("a")
    router.cancel("a", counter=1)
    other.cancel("a", counter=1)
    world.run()
    assert world.events().count("cancel.stale") == 2
    assert other.tokens() == expected(request())


def test_a_deadline_counts_from_the_reservation() -> None:
    world = CoreWorld()
    router = world.router()
    router.reserve(replace(request(max_tokens=100), timeout_s=5.0))
    assert world.receiver.reserved[world.stream().transfer_id].deadline == world.now + 5.0
    world.advance(4.0)
    world.claim(request(max_tokens=100))
    world.step(3)
    world.advance(1.0)
    world.run()
    assert router.last("ended").finish_reason == types_pb2.FINISH_REASON_DEADLINE
    world.check_nothing_left()


@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_a_replay_that_differs_is_data_loss_and_counted(wrong: int) -> None:
    world = CoreWorld()
    router = world.router()
    ids = expected(request())[:6]
    ids[wrong] += 1
    router.start(replace(request(), emitted_token_ids=tuple(ids)))
    world.run()
    ended = router.last("ended")
    assert (ended.finish_reason, ended.reason) == (ERROR, "REPLAY_MISMATCH")
    assert router.tokens() == []
    assert world.core.streams.counters["replay.mismatch"] == 1
    world.check_nothing_left()


def test_a_higher_counter_makes_a_running_stream_give_way_at_once_and_unheard() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request())
    world.step(2)
    world.turn()  # computed, and not delivered yet
    router.reserve(request(), counter=2)
    router.forget("a")
    world.claim(request())
    assert world.results, "what the first reservation computed comes after the claim of the second"
    world.run()
    assert router.last("ended").counter == 2
    assert router.tokens() == expected(request())
    world.check_nothing_left()


def test_when_the_worker_stops_nobody_hears_that_streams_ended() -> None:
    world = CoreWorld()
    router = world.router()
    for name in ("a", "b"):
        router.start(request(name))
    router.reserve(request("c"))
    world.step(2)
    router.read()
    world.core.attachments.abandon_all(world.now)
    world.loop.close(world.now)
    world.deliver()
    assert router.read() == []
    world.check_nothing_left()
