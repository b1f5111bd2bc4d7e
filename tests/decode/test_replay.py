"""Tokens that were emitted before: computed again, compared, never sent twice."""

from dataclasses import replace

import pytest

from decode_service.scheduler import MAX_EXTRA_ROWS, Scheduler
from decode_service.step_messages import JoinBatch
from decode_service.stream_run import StreamRun
from decode_service.work import Continue, Replay
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
        assert len(here.workers[0].table) == 0


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


@pytest.mark.parametrize(("moment", "num_known"), [("before its first step", 20), ("computed", 20), ("delivered", 21)])
async def test_who_attaches_below_the_replayed_tokens_gets_them_with_their_logprobs(
    moment: str, num_known: int
) -> None:
    """The record holds the emitted tokens, and the next one once the replaying step has been delivered."""
    plain = request()
    expected = oracle(plain)
    async with world("d1") as here:
        worker, router, other = here.workers[0], await here.router(), await here.router()
        if moment == "before its first step":
            worker.may_begin_step.clear()
        elif moment == "computed":
            worker.may_step.clear()
        else:
            worker.num_steps_allowed = 1
        await router.start(here.prefill, emitted(plain, expected[:20]))
        stream = worker.table.get(plain.request_id)
        assert stream is not None
        if moment == "computed":
            runs = worker.step_loop._scheduler
            await until(lambda: [len(run.token_ids) for run in runs] == [21], "the step has run")
        if moment == "delivered":
            await until(lambda: len(stream.tokens) == 21, "the step has been delivered")
        attached = await other.attach(plain.request_id, 3)
        assert list(attached.request.emitted_token_ids) == [token.id for token in expected[:num_known]]
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


def run(name: str, num_emitted: int, num_done: int = 1) -> StreamRun:
    asked = request(sampling=replace(SEEDED, max_tokens=2000), emitted_token_ids=tuple(range(num_emitted)))
    made = StreamRun(asked, name, context_length=4096, deadline=None, block_table=[], num_set_aside=0)
    made.token_ids += range(num_done)
    return made


def test_a_step_replays_a_bounded_number_of_rows_the_oldest_stream_first() -> None:
    scheduler = Scheduler(8)
    runs = [run("a", 0), run("b", 50), run("c", 1000), run("d", 1000)]
    for made in runs:
        scheduler.join(JoinBatch(made, 0))
    assert [join.run for join in scheduler.admit()] == runs
    works = scheduler.works({})
    assert [work.run for work in works] == runs
    assert [type(work) for work in works] == [Continue, Replay, Replay, Replay]
    assert [work.num_rows for work in works] == [1, 50, 1 + MAX_EXTRA_ROWS - 49, 1]
    assert [len(work.rows()) for work in works] == [work.num_rows for work in works]
    assert [len(sampling.token_ids) for _, sampling in works[1].rows()] == list(range(1, 51))
    assert works[0].rows()[0][1].token_ids is runs[0].token_ids
