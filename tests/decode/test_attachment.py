"""Who reads a stream: sessions that break and come back, routers that take over, streams kept after their end."""

import pytest

from decode_service import stream_table
from decode_service.attachment import SESSION_GRACE_S
from isthmus.clock import SystemClock
from isthmus.v1 import decode_pb2, types_pb2
from kv_transfer.ownership.memory import MemoryKeys
from tests.decode.world import RETAIN, Router, Worker, oracle, request, until, world


def cancel(router: Router, request_id: str, counter: int) -> decode_pb2.CancelStream:
    return decode_pb2.CancelStream(request_id=request_id, attach=router.key(counter))


async def ended(worker: Worker) -> None:
    await until(lambda: len(worker.table) == 0, "every stream has ended")
    assert worker.engine.pool.counts().referenced == 0


@pytest.mark.parametrize("terms", [{}, {"on_disconnect": RETAIN, "retention_s": 30}], ids=["abort", "retain"])
async def test_a_session_that_breaks_and_comes_back_loses_and_repeats_nothing(terms: dict[str, int]) -> None:
    asked = request()
    expected = oracle(asked)
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        await router.start(here.prefill, asked, **terms)
        assert await router.tokens(asked.request_id, 0, 5) == expected[:5]
        await router.lose()
        assert "stream.orphaned" in worker.events(asked.request_id)
        here.clock.advance(SESSION_GRACE_S - 0.1)
        worker.sweep()
        await router.connect(**{asked.request_id: 3})
        here.clock.advance(100.0)
        worker.sweep()
        tokens, _ = await router.rest(asked.request_id, 3)
        assert tokens == expected[3:]


async def test_a_stream_that_finished_while_its_session_was_broken_is_sent_again() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        await router.start(here.prefill, asked)
        await router.lose()
        await ended(worker)
        await router.connect(**{asked.request_id: 2})
        tokens, last = await router.rest(asked.request_id, 2)
        assert tokens == oracle(asked)[2:]
        assert last.finish_reason == types_pb2.FINISH_REASON_LENGTH
        here.clock.advance(SESSION_GRACE_S)
        worker.sweep()
        assert worker.table.get(asked.request_id) is None


@pytest.mark.parametrize(
    ("terms", "kept_s"), [({}, SESSION_GRACE_S), ({"on_disconnect": RETAIN, "retention_s": 30}, 30.0)]
)
async def test_a_stream_nobody_comes_back_for_ends(terms: dict[str, int], kept_s: float) -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        with worker.held():
            await router.start(here.prefill, asked, **terms)
            await router.tokens(asked.request_id, 0, 1)
            await router.lose()
            here.clock.advance(kept_s - 0.01)
            worker.sweep()
            assert worker.table.get(asked.request_id).ending is None  # type: ignore[union-attr]
            here.clock.advance(0.02)
            worker.sweep()
        await ended(worker)
        assert worker.table.get(asked.request_id) is None


async def test_a_reservation_nobody_comes_back_for_is_given_back() -> None:
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        await router.reserve(request())
        await router.lose()
        here.clock.advance(SESSION_GRACE_S)
        worker.sweep()
        await ended(worker)


async def test_streams_that_a_returning_router_does_not_name_end_and_others_stay() -> None:
    first, second, foreign = request(20), request(30), request(40)
    async with world("d1") as here:
        worker, router, other = here.workers[0], await here.router(), await here.router()
        with worker.held():
            for asked in (first, second):
                await router.reserve(asked)
            await other.reserve(foreign)
            await router.lose()
            hello = await router.connect(**{second.request_id: 0, "unknown": 7})
        assert list(hello.unknown_streams) == ["unknown"]
        await until(lambda: len(worker.table) == 2, "the unnamed stream has ended")
        assert worker.table.get(first.request_id) is None


async def test_a_second_session_of_a_router_replaces_the_first() -> None:
    asked = request()
    async with world("d1") as here:
        worker, first = here.workers[0], await here.router()
        with worker.held():
            await first.start(here.prefill, asked)
            again = Router(worker, first.incarnation)
            here.routers.append(again)
            await again.connect(**{asked.request_id: 0})
        tokens, _ = await again.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_any_router_takes_a_retained_stream_over_with_its_record() -> None:
    asked = request()
    expected = oracle(asked)
    async with world("d1") as here:
        worker, router, other = here.workers[0], await here.router(), await here.router()
        with worker.held():
            await router.start(here.prefill, asked, on_disconnect=RETAIN, retention_s=30)
            await router.tokens(asked.request_id, 0, 1)
            attached = await other.attach(asked.request_id, 1)
            assert (attached.attach.counter, attached.attach.router_incarnation) == (2, other.incarnation)
            assert (attached.on_disconnect, attached.retention_s, attached.next_index) == (RETAIN, 30, 1)
            assert list(attached.request.prompt_token_ids) == list(asked.prompt_token_ids)
            assert attached.request.seed == asked.seed
            known = list(attached.request.emitted_token_ids)
            assert known == [token.id for token in expected[: len(known)]]
            detached = (await router.next("detached")).detached
            assert detached.attach.router_incarnation == other.incarnation
            router.say(cancel=cancel(router, asked.request_id, 1))
            await until(lambda: "cancel.stale" in worker.events(asked.request_id), "the stale cancel is noted")
        tokens, _ = await other.rest(asked.request_id, 1)
        assert tokens == expected[1:]
        assert router.heard_nothing()


async def test_a_router_that_missed_the_takeover_hears_of_it_when_it_comes_back() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router, other = here.workers[0], await here.router(), await here.router()
        with worker.held():
            await router.start(here.prefill, asked)
            await router.lose()
            await other.attach(asked.request_id, 0)
            await router.connect(**{asked.request_id: 0})
            assert (await router.next("detached")).detached.attach.counter == 2
        tokens, _ = await other.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_finished_stream_is_kept_until_it_is_released() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router, other = here.workers[0], await here.router(), await here.router()
        await router.start(here.prefill, asked, on_disconnect=RETAIN, retention_s=30)
        router.say(release={"request_id": asked.request_id, "attach": router.key(1)})  # too early: ignored
        await router.rest(asked.request_id, 0)
        await ended(worker)
        for _ in range(2):
            await other.attach(asked.request_id, 10)
            tokens, last = await other.rest(asked.request_id, 10)
            assert (tokens, last.num_tokens) == (oracle(asked)[10:], 40)
        await router.next("detached")
        await worker.mirror.flush(1.0)
        assert await here.store.streams.find(asked.request_id) == worker.identity.incarnation
        other.say(release={"request_id": asked.request_id, "attach": other.key(3)})
        await until(lambda: worker.table.get(asked.request_id) is None, "it is forgotten")
        other.say(attach={"request_id": asked.request_id})
        assert (await other.next("refused")).refused.reason == "STREAM_GONE"
        await worker.mirror.flush(1.0)
        assert await here.store.streams.find(asked.request_id) is None


async def test_a_finished_stream_is_kept_no_longer_than_its_retention() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        await router.start(here.prefill, asked, on_disconnect=RETAIN, retention_s=30)
        await router.rest(asked.request_id, 0)
        here.clock.advance(29.9)
        worker.sweep()
        assert worker.table.get(asked.request_id) is not None
        here.clock.advance(0.2)
        worker.sweep()
        assert worker.table.get(asked.request_id) is None


async def test_a_cancelled_stream_is_not_kept() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        with worker.held():
            await router.start(here.prefill, asked, on_disconnect=RETAIN, retention_s=30)
            router.say(cancel=cancel(router, asked.request_id, 1))
        _, last = await router.rest(asked.request_id, 0)
        assert last.finish_reason == types_pb2.FINISH_REASON_CANCELLED
        assert worker.table.get(asked.request_id) is None


async def test_attaching_beyond_the_last_token_or_to_nothing_is_refused() -> None:
    asked = request()
    async with world("d1") as here:
        router = await here.router()
        await router.start(here.prefill, asked, on_disconnect=RETAIN, retention_s=30)
        await router.rest(asked.request_id, 0)
        router.say(attach={"request_id": asked.request_id, "next_index": 41})
        assert (await router.next("refused")).refused.reason == "INDEX_OUT_OF_RANGE"
        router.say(attach={"request_id": "unknown"})
        assert (await router.next("refused")).refused.reason == "STREAM_GONE"
        find = decode_pb2.FindRequest(request_id=asked.request_id)
        found = await here.workers[0].server.Find(find, None)  # type: ignore[arg-type]
        assert (found.found, found.next_index) == (True, 40)


@pytest.mark.parametrize("phase", ["filling", "running", "finished"])
async def test_a_higher_counter_replaces_the_reservation_without_a_word(phase: str) -> None:
    asked = request()
    async with world("d1") as here:
        router = await here.router()
        reserved = await router.reserve(asked, on_disconnect=RETAIN, retention_s=30)
        if phase != "filling":
            await here.prefill.fill(asked, reserved)
            await router.rest(asked.request_id, 0)
        with pytest.raises(AssertionError, match="STALE_OWNER"):
            await router.reserve(asked, counter=1)
        again = await router.reserve(asked, counter=2)
        assert again.transfer_id != reserved.transfer_id
        await here.prefill.fill(asked, again)
        tokens, _ = await router.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_running_stream_makes_way_for_a_higher_counter() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        with worker.held():
            await router.start(here.prefill, asked)
            await router.tokens(asked.request_id, 0, 1)
            again = await router.reserve(asked, counter=2)
        await here.prefill.fill(asked, again)
        tokens, _ = await router.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_router_whose_stream_makes_way_for_another_router_hears_of_it() -> None:
    asked = request()
    async with world("d1") as here:
        first, second = await here.router(), await here.router()
        await first.start(here.prefill, asked)
        await first.tokens(asked.request_id, 0, 1)
        again = await second.reserve(asked, counter=2)
        told = await first.until("detached")
        assert told.detached.attach == second.key(2)
        await here.prefill.fill(asked, again)
        tokens, _ = await second.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_draining_worker_tells_every_router_and_does_not_wait_for_what_has_finished() -> None:
    asked, kept = request(), request(20)
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        await router.start(here.prefill, kept, on_disconnect=RETAIN, retention_s=30)
        await router.rest(kept.request_id, 0)
        await router.reserve(asked)
        assert await worker.server.drain(0.0) == 1
        await router.next("leaving")
        late = await here.router()
        await late.next("leaving")
        with pytest.raises(AssertionError, match="DRAINING"):
            await late.reserve(request(30))
        router.say(cancel=cancel(router, asked.request_id, 1))
        assert await worker.server.drain(5.0) == 0


async def test_everything_is_reported_again_to_a_store_that_forgot_it() -> None:
    running, filling, finished = request(20), request(30), request(40)
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        await router.start(here.prefill, finished, on_disconnect=RETAIN, retention_s=30)
        await router.rest(finished.request_id, 0)
        with worker.held():
            claimed = await router.start(here.prefill, running)
            await router.tokens(running.request_id, 0, 1)
            open_one = await router.reserve(filling)
            await worker.mirror.flush(1.0)
            here.store.keys = MemoryKeys.empty(SystemClock())
            for _ in range(3):
                worker.report.again()
            await worker.mirror.flush(1.0)
            for asked in (running, finished):
                assert await here.store.streams.find(asked.request_id) == worker.identity.incarnation
            states = [await here.store.find_handoff(reserved.transfer_id) for reserved in (claimed, open_one)]
            assert [state.state.value if state else None for state in states] == ["CLAIMED", "RESERVED"]
            assert worker.mirror.counters == {}


async def test_kept_streams_are_bounded_and_the_oldest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_table, "MAX_KEPT", 2)
    asked = [request(length) for length in (20, 30, 40)]
    async with world("d1") as here:
        router = await here.router()
        for one in asked:
            await router.start(here.prefill, one, on_disconnect=RETAIN, retention_s=30)
            await router.rest(one.request_id, 0)
        assert [one.request_id for one in asked[1:]] == [stream.request_id for stream in here.workers[0].table.kept()]
