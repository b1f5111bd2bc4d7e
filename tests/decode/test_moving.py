"""A stream moves between decode workers: blocks and tokens, the same bits, nothing computed again, nothing left."""

from dataclasses import replace

import pytest

from decode_service.stream import Phase
from isthmus.types import Request
from isthmus.v1 import decode_pb2, types_pb2
from tests.decode.world import SEEDED, Router, World, oracle, request, until, world

LONG = replace(SEEDED, max_tokens=100)


def move(router: Router, asked: Request, target: decode_pb2.Reserved, counter: int = 1) -> decode_pb2.Move:
    return decode_pb2.Move(request_id=asked.request_id, attach=router.key(counter), target=target)


async def running(here: World, asked: Request) -> tuple[Router, Router]:
    """One router's sessions with both workers; the first runs the stream."""
    first = await here.router(0)
    second = await here.router(1, first.incarnation)
    await first.start(here.prefill, asked)
    return first, second


async def moved(first: Router) -> decode_pb2.Moved:
    return (await first.until("moved")).moved


@pytest.mark.parametrize("num_emitted", [0, 3], ids=["nothing", "some tokens"])
async def test_a_moved_stream_goes_on_with_the_same_bits_and_computes_nothing_again(num_emitted: int) -> None:
    """Whatever part of its tokens the router says it has, the new worker sends the others."""
    asked = request(sampling=LONG)
    expected = oracle(asked)
    async with world("d1", "d2") as here:
        source, target = here.workers
        first, second = await running(here, asked)
        await first.tokens(asked.request_id, 0, 5)
        with source.held():
            known = replace(asked, emitted_token_ids=tuple(token.id for token in expected[:num_emitted]))
            reserved = await second.reserve(known, counter=2, moves=True)
            first.say(move=move(first, asked, reserved))
            await first.was_heard()
        answer = await moved(first)
        assert (answer.acked, answer.transfer_id) == (True, reserved.transfer_id), answer
        sent = first.tokens_of[asked.request_id]
        assert sent == expected[: len(sent)]
        tokens, _ = await second.rest(asked.request_id, num_emitted)
        assert tokens == expected[num_emitted:]
        assert "stream.replayed" not in target.events(asked.request_id)
        assert target.context.progress.num_steps <= len(expected) - len(sent)
        assert source.engine.pool.counts().referenced == len(source.table) == 0
        assert "stream.moved" in source.events(asked.request_id)


async def test_a_moved_stream_that_the_router_knows_further_than_its_worker_replays_the_rest() -> None:
    asked = request(sampling=LONG)
    expected = oracle(asked)
    async with world("d1", "d2") as here:
        source, target = here.workers
        first, second = await running(here, asked)
        with source.held():
            known = replace(asked, emitted_token_ids=tuple(token.id for token in expected[:80]))
            reserved = await second.reserve(known, counter=2, moves=True)
            first.say(move=move(first, asked, reserved))
            await first.was_heard()
        assert (await moved(first)).acked
        tokens, _ = await second.rest(asked.request_id, 80)
        assert tokens == expected[80:]
        assert "stream.replayed" in target.events(asked.request_id)


async def hint(here: World, asked: Request) -> str | None:
    for worker in here.workers:
        await worker.mirror.flush(1.0)
    return await here.store.streams.find(asked.request_id)


async def test_the_hint_names_the_new_worker_after_a_move() -> None:
    asked = request(sampling=LONG)
    async with world("d1", "d2") as here:
        first, second = await running(here, asked)
        with here.workers[1].held():
            first.say(move=move(first, asked, await second.reserve(asked, counter=2, moves=True)))
            assert (await moved(first)).acked
            assert await hint(here, asked) == here.workers[1].identity.incarnation


async def test_a_stream_moves_back() -> None:
    asked = request(sampling=LONG)
    async with world("d1", "d2") as here:
        first, second = await running(here, asked)
        with here.workers[1].held():
            first.say(move=move(first, asked, await second.reserve(asked, counter=2, moves=True)))
            assert (await moved(first)).acked
            back = await first.reserve(asked, counter=3, moves=True)
            second.say(move=move(second, asked, back, counter=2))
            await second.was_heard()
        assert (await moved(second)).acked
        tokens, _ = await first.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


@pytest.mark.parametrize("problem", ["unreachable", "cancelled"])
async def test_a_move_that_fails_leaves_the_stream_where_it_is(problem: str) -> None:
    asked = request(sampling=LONG)
    async with world("d1", "d2") as here:
        first, second = await running(here, asked)
        reserved = await second.reserve(asked, counter=2, moves=True)
        if problem == "unreachable":
            reserved.zmq_endpoint = "tcp://127.0.0.1:9"
        second.say(cancel={"request_id": asked.request_id, "attach": second.key(2)})
        await second.next("ended")
        first.say(move=move(first, asked, reserved))
        answer = await moved(first)
        assert not answer.acked
        assert answer.failure
        tokens, _ = await first.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_only_a_running_stream_moves() -> None:
    asked = request(sampling=LONG)
    async with world("d1") as here:
        first = await here.router()
        reserved = await first.reserve(asked)
        first.say(move=move(first, asked, reserved))
        assert (await moved(first)).failure == "it is filling"
        first.say(move=decode_pb2.Move(request_id="unknown", target=reserved))
        assert not (await moved(first)).acked


@pytest.mark.parametrize("when", ["before the step ended", "while its blocks leave"])
async def test_a_cancel_crosses_a_move(when: str) -> None:
    asked = request(sampling=LONG)
    async with world("d1", "d2") as here:
        source = here.workers[0]
        first, second = await running(here, asked)
        reserved = await second.reserve(asked, counter=2, moves=True)
        with source.held(), here.workers[1].deaf():
            first.say(move=move(first, asked, reserved))
            await first.was_heard()
            if when == "while its blocks leave":
                source.may_step.set()
                stream = source.table.get(asked.request_id)
                await until(lambda: stream and stream.phase is Phase.MOVING, "it moves")
            first.say(cancel={"request_id": asked.request_id, "attach": first.key(1)})
            if when == "before the step ended":
                await first.was_heard()
            source.may_step.set()
            _, last = await first.rest(asked.request_id, 0)
        assert last.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        await until(lambda: source.engine.pool.counts().referenced == 0, "nothing is left of it")
        if when == "while its blocks leave":
            answer = await second._hear()
            # A commit that was on its way before the cancel makes the stream the other worker's, which goes on.
            assert answer.WhichOneof("message") == "step" or answer.transfer_failed.reason == "cancelled"
        second.say(cancel={"request_id": asked.request_id, "attach": second.key(2)})
        assert (await second.until("ended")).ended.finish_reason == types_pb2.FINISH_REASON_CANCELLED


async def test_another_router_that_attaches_stops_the_move_and_has_the_stream() -> None:
    asked = request(sampling=LONG)
    async with world("d1", "d2") as here:
        source = here.workers[0]
        first, second = await running(here, asked)
        third = await here.router(0)
        reserved = await second.reserve(asked, counter=2, moves=True)
        with source.held():
            first.say(move=move(first, asked, reserved))
            await first.was_heard()
            await third.attach(asked.request_id, 0)
        answer = await moved(third)
        assert not answer.acked
        tokens, _ = await third.rest(asked.request_id, 0)
        assert tokens == oracle(asked)
