"""Who reads a worker's streams, and moves of them, as cores in virtual time: sessions, attaches, drains."""

import pytest

from decode_service import session, stream_table
from decode_service.attachment import SESSION_GRACE_S
from isthmus.errors import Overloaded
from isthmus.v1 import decode_pb2, types_pb2
from tests.decode.core_world import RETAIN, CoreWorld, FakeRouter, begin_move, expected, request

ERROR = types_pb2.FINISH_REASON_ERROR
ENDED_AS_CANCELLED = types_pb2.FINISH_REASON_CANCELLED


def test_one_message_a_step_carries_all_streams_of_a_router_and_the_ends_follow() -> None:
    world = CoreWorld()
    first = world.router("first")
    second = world.router("second")
    for name in ("a", "b"):
        first.start(request(name, max_tokens=2))
    second.start(request("c", max_tokens=2))
    first.read()
    second.read()
    world.step()
    step, *ends = first.read()
    assert [part.request_id for part in step.step.streams] == ["a", "b"]
    assert [message.ended.request_id for message in ends] == ["a", "b"]
    assert second.kinds() == ["step", "ended"]


def test_who_attaches_sees_what_was_delivered_and_nothing_that_is_still_on_its_way() -> None:
    world = CoreWorld()
    router = world.router()
    other = world.router("other")
    router.start(request(), **RETAIN)
    world.step(2)
    world.turn()
    other.attach("a", next_index=4)
    assert other.last("refused").reason == "INDEX_OUT_OF_RANGE"
    other.attach("a", next_index=1)
    attached = other.read()[0].attached
    assert list(attached.request.emitted_token_ids) == expected(request())[:3]
    found = world.core.requests.find(decode_pb2.FindRequest(request_id="a"))
    assert (found.found, found.next_index) == (True, 3)
    world.run()
    other.read()
    assert other.tokens() == expected(request())[1:]
    assert router.read()[-1].detached.attach.counter == 2


def test_a_router_that_comes_back_is_sent_everything_from_where_it_was() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request("a"), **RETAIN)
    router.start(request("b"))
    world.step(4)
    router.lose()
    world.run()
    world.advance(SESSION_GRACE_S - 0.1)
    world.sweep()
    again = world.router(a=2, b=0, gone=1)
    assert again.read()[0].hello.unknown_streams == ["gone"]
    assert again.tokens("a") == expected(request("a"))[2:]
    assert again.tokens("b") == expected(request("b"))
    world.advance(SESSION_GRACE_S)
    world.sweep()
    assert world.core.streams.table.get("b") is None
    world.advance(30.0)
    world.sweep()
    assert world.core.streams.table.get("a") is None
    assert world.report.streams == set()


def test_a_router_that_does_not_read_loses_its_session_and_its_streams_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_QUEUED_MESSAGES", 5)
    world = CoreWorld()
    router = world.router()
    router.start(request())
    world.step(3)
    assert router.session.is_overflowing
    assert not router.session.is_over
    world.step()
    assert router.kinds() == ["reserved", "step", "step", "step", "step"]
    assert router.session.is_over
    router.lose()
    world.run()
    assert router.read() == []
    again = world.router(a=4)
    assert again.tokens() == expected(request())[4:]


def test_kept_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_table, "MAX_KEPT", 2)
    world = CoreWorld()
    router = world.router()
    for name in ("a", "b", "c"):
        router.start(request(name), **RETAIN)
        world.run()
    assert [stream.request_id for stream in world.core.streams.table.kept()] == ["b", "c"]
    assert world.report.streams == {"b", "c"}


def test_a_draining_worker_says_so_and_refuses() -> None:
    world = CoreWorld()
    router = world.router()
    world.core.attachments.begin_drain()
    assert router.kinds() == ["leaving"]
    late = FakeRouter(world, "late", {"none": 0})
    assert late.kinds() == ["hello", "leaving"]
    late.reserve(request())
    assert late.last("refused").reason == "DRAINING"


def test_a_worker_without_blocks_for_the_whole_request_refuses_it_and_keeps_nothing() -> None:
    world = CoreWorld(num_blocks=4)
    router = world.router()
    router.reserve(request(num_prompt_tokens=40, max_tokens=30))
    assert router.last("refused").reason == "NO_FREE_BLOCKS"
    router.reserve(request(max_tokens=5000))
    assert router.last("refused").reason == "INVALID_REQUEST"
    world.check_nothing_left()


def test_a_move_takes_rows_and_tokens_along_and_leaves_nothing() -> None:
    world = CoreWorld()
    router = world.router()
    begin_move(world, router)
    (move,) = world.sender.moves
    assert [token.id for token in move.committed or ()] == expected(request())[:4]
    assert {(first, n) for _, _, first, n in move.rows} == {(0, 20 + 3)}
    world.finish_move()
    answer = router.last("moved")
    assert (answer.acked, answer.failure) == (True, "")
    assert "stream.moved" in world.events()
    assert world.report.streams == set()
    world.check_nothing_left()


@pytest.mark.parametrize("refused", [False, True], ids=["not acknowledged", "not sent"])
def test_a_stream_that_could_not_move_goes_on_where_it_is(refused: bool) -> None:
    world = CoreWorld()
    router = world.router()
    if refused:
        world.sender.refusal = Overloaded("full")
        router.start(request())
        world.step(3)
        router.read()
        router.move("a")
        world.step()
    else:
        begin_move(world, router)
        world.finish_move("the other worker died")
    answer = next(message.moved for message in router.read() if message.WhichOneof("message") == "moved")
    assert (answer.acked, answer.failure) == (False, "full" if refused else "the other worker died")
    world.run()
    router.read()
    assert router.tokens() == expected(request())
    world.check_nothing_left()


def test_a_cancel_that_crosses_the_hand_over_ends_the_stream_in_either_order() -> None:
    for is_first in (True, False):
        world = CoreWorld()
        router = world.router()
        router.start(request())
        world.step(2)
        if is_first:
            router.cancel("a")
        router.move("a")
        world.turn()
        if not is_first:
            router.cancel("a")
        world.run()
        kinds = router.kinds()
        assert "ended" in kinds
        assert world.sender.moves == []
        assert world.core.streams.table.get("a") is None
        world.check_nothing_left()


def test_a_router_that_attaches_meanwhile_stops_the_move() -> None:
    world = CoreWorld()
    router = world.router()
    other = world.router("other")
    begin_move(world, router)
    other.attach("a")
    assert world.sender.moves[0].aborted == "attached by another router"
    world.finish_move("attached by another router")
    world.run()
    assert "moved" in other.kinds()
    assert other.tokens() == expected(request())


def test_a_router_that_attaches_before_the_stream_was_handed_over_has_it_and_nothing_is_sent() -> None:
    world = CoreWorld()
    router = world.router()
    other = world.router("other")
    router.start(request())
    world.step(2)
    router.move("a")
    world.turn()
    other.attach("a")
    world.run()
    failures = [message.moved.failure for message in other.read() if message.WhichOneof("message") == "moved"]
    assert failures == ["attached by another router"]
    assert world.sender.moves == []
    assert other.tokens() == expected(request())
    world.check_nothing_left()


def test_a_second_move_of_a_stream_that_moves_is_answered() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request())
    world.step()
    router.move("a")
    router.move("a")
    world.turn()
    world.deliver()
    moved = [message.moved.failure for message in router.read() if message.WhichOneof("message") == "moved"]
    assert moved == ["it is not running any more"]
    router.move("a")
    assert router.last("moved").failure == "it is moving"
    world.finish_move()
    assert router.last("moved").acked


def test_a_stream_that_moves_here_writes_every_block_at_once() -> None:
    world = CoreWorld()
    router = world.router()
    asked = request(max_tokens=30)
    router.reserve(asked, moves=True)
    reserved = router.last("reserved")
    assert {part.num_tokens for part in reserved.missing} == {20 + 30 - 1}
    assert world.receiver.reserved[reserved.transfer_id].open_from == 20
    world.claim(asked, num_tokens=12)
    world.run()
    router.read()
    assert router.tokens() == expected(asked)
    assert world.engine.decoder.num_steps == 18
    world.check_nothing_left()


def test_everything_is_said_again_to_a_store_that_forgot() -> None:
    world = CoreWorld()
    router = world.router()
    router.start(request("kept"), **RETAIN)
    world.run()
    router.start(request("a"))
    router.reserve(request("filling"))
    world.report.streams.clear()
    world.core.streams.restate()
    assert world.report.streams == {"kept", "a"}
    assert world.receiver.num_restated == 1
