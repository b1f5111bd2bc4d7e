"""Tokens that were emitted before: computed again, compared, never sent twice."""

from dataclasses import replace

import pytest

from decode_service.scheduler import REPLAY_ROWS, Scheduler
from decode_service.session import NOBODY
from decode_service.stream import AttachKey, Stream
from isthmus.types import Request, SamplingParams, Token
from isthmus.v1 import types_pb2
from tests.decode.world import SEEDED, oracle, request, until, world

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, logprobs=1)


def emitted(request: Request, tokens: list[Token]) -> Request:
    return replace(request, emitted_token_ids=tuple(token.id for token in tokens))


@pytest.mark.parametrize("sampling", [SEEDED, GREEDY], ids=["seeded", "greedy"])
@pytest.mark.parametrize("num_emitted", [0, 1, 2, 17, 39])
async def test_a_replayed_stream_goes_on_with_the_same_bits(num_emitted: int, sampling: SamplingParams) -> None:
    plain = request(sampling=sampling)
    expected = oracle(plain)
    async with world("d1") as here:
        router = await here.router()
        await router.start(here.prefill, emitted(plain, expected[:num_emitted]))
        tokens, ended = await router.rest(plain.request_id, num_emitted)
        assert tokens == expected[num_emitted:]
        assert ended.num_tokens == len(expected)
        assert ("stream.replayed" in here.workers[0].events(plain.request_id)) == (num_emitted > 1)


async def test_the_claim_of_a_replayed_stream_is_told_before_any_token() -> None:
    plain = request()
    async with world("d1") as here:
        router = await here.router()
        with here.workers[0].held():
            await router.start(here.prefill, emitted(plain, oracle(plain)[:9]))
            (part,) = (await router.next("step")).step.streams
            assert (part.request_id, part.index, list(part.tokens)) == (plain.request_id, 9, [])


@pytest.mark.parametrize("wrong", [0, 1, 8])
async def test_a_token_that_differs_ends_the_stream_and_is_counted(wrong: int) -> None:
    plain = request()
    ids = [token.id for token in oracle(plain)[:9]]
    ids[wrong] = (ids[wrong] + 1) % 2000
    async with world("d1") as here:
        router = await here.router()
        await router.start(here.prefill, replace(plain, emitted_token_ids=tuple(ids)))
        tokens, ended = await router.rest(plain.request_id, 9)
        assert (tokens, ended.reason) == ([], "REPLAY_MISMATCH")
        assert ended.finish_reason == types_pb2.FINISH_REASON_ERROR
        assert here.workers[0].streams.counters["replay.mismatch"] == 1
        assert len(here.workers[0].streams) == 0


async def test_emitted_tokens_that_go_on_after_an_end_are_a_mismatch() -> None:
    plain = request()
    expected = oracle(plain)
    stopping = replace(plain, sampling=replace(SEEDED, stop_token_ids=(expected[5].id,)))
    async with world("d1") as here:
        router = await here.router()
        await router.start(here.prefill, emitted(stopping, expected[:9]))
        tokens, ended = await router.rest(plain.request_id, 9)
        assert (tokens, ended.reason) == ([], "REPLAY_MISMATCH")


@pytest.mark.parametrize("ids", [(2048,), tuple(range(40))], ids=["outside the vocabulary", "max_tokens of them"])
async def test_emitted_tokens_that_cannot_be_replayed_are_refused(ids: tuple[int, ...]) -> None:
    async with world("d1") as here:
        router = await here.router()
        with pytest.raises(AssertionError, match="INVALID_REQUEST"):
            await router.reserve(replace(request(), emitted_token_ids=ids))


@pytest.mark.parametrize("num_computed", [20, 21], ids=["before its first step", "after it"])
async def test_who_attaches_below_the_replayed_tokens_gets_them_with_their_logprobs(num_computed: int) -> None:
    """The record holds every token known: the emitted ones, and the next one once the replaying step has run."""
    plain = request()
    expected = oracle(plain)
    async with world("d1") as here:
        worker, router, other = here.workers[0], await here.router(), await here.router()
        worker.may_begin_step.clear() if num_computed == 20 else worker.may_step.clear()
        await router.start(here.prefill, emitted(plain, expected[:20]))
        stream = worker.streams.get(plain.request_id)
        if num_computed == 21:
            await until(lambda: stream is not None and len(stream.tokens) == num_computed, "the step has run")
        attached = await other.attach(plain.request_id, 3)
        assert list(attached.request.emitted_token_ids) == [token.id for token in expected[:num_computed]]
        worker.may_begin_step.set()
        worker.may_step.set()
        tokens, _ = await other.rest(plain.request_id, 3)
        assert tokens == expected[3:]


async def test_a_stream_replays_beside_one_that_runs_and_neither_changes() -> None:
    long = replace(SEEDED, max_tokens=120)
    running, replaying = request(30, long), request(70, long)
    expected = {r.request_id: oracle(r) for r in (running, replaying)}
    async with world("d1") as here:
        router = await here.router()
        await router.start(here.prefill, running)
        await until(lambda: here.workers[0].context.progress.num_steps > 3, "it runs")
        await router.start(here.prefill, emitted(replaying, expected[replaying.request_id][:100]))
        for _ in range(2):
            await router.until("ended")
        assert router.tokens_of[running.request_id] == expected[running.request_id]
        assert router.tokens_of[replaying.request_id] == expected[replaying.request_id][100:]
        assert here.workers[0].event(replaying.request_id, "stream.replayed")["num_tokens"] == "99"


def stream(num_emitted: int, num_done: int = 1) -> Stream:
    made = Stream(
        request=replace(request(), emitted_token_ids=tuple(range(num_emitted))),
        attach=AttachKey("r", 1),
        sink=NOBODY,
        retention_s=None,
        transfer_id="t",
        attempt=1,
        block_table=[],
        num_set_aside=0,
        num_cached_tokens=0,
        missing=(),
        deadline=None,
    )
    made.token_ids += range(num_done)
    return made


def test_a_step_replays_a_bounded_number_of_rows_the_oldest_stream_first() -> None:
    scheduler = Scheduler(8, on_run=lambda _: None)
    for made in (stream(0), stream(50), stream(1000), stream(1000)):
        scheduler.join(made)
    batch = scheduler.batch()
    assert [len(rows) for _, rows in batch] == [1, 50, 1 + REPLAY_ROWS - 49, 1]
    assert [len(sampling.token_ids) for _, sampling in batch[1][1]] == list(range(1, 51))
    assert batch[0][1][0][1].token_ids is batch[0][0].token_ids
