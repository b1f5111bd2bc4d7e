"""The decode loop as a core: turns, commands and emissions, without a thread and in a time of the test's own."""

from dataclasses import replace

import pytest

from decode_service.scheduler import MAX_EXTRA_ROWS
from decode_service.step_loop import DecodeLoop
from decode_service.step_messages import Emission, HandedOver, HandOver, JoinBatch, LeaveBatch
from decode_service.stream_run import Ended, StreamRun
from decode_service.work import Continue, Replay, next_work
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.process.health import ProgressWatch
from isthmus.steps import FromPrevious
from isthmus.testing.block_pool_check import check_partition
from isthmus.testing.fake_decode_engine import FakeDecodeEngine
from isthmus.testing.manual_clock import ManualClock
from isthmus.types import FinishReason, Request, Token
from isthmus.worker.instruments import Instruments
from tests.decode.core_world import expected, request

CANCELLED = Ended(FinishReason.CANCELLED)
BOTH = pytest.mark.parametrize("runs_ahead", [False, True], ids=["one by one", "ahead"])


class Bench:
    """One loop over a fake engine, and everything it said, in order."""

    def __init__(self, *, runs_ahead: bool = False, max_batch: int = 8, fails_at: int = 0):
        def on_step(number: int) -> None:
            if number == fails_at:
                raise RuntimeError("the device is not well")

        self.clock = ManualClock()
        self.engine = FakeDecodeEngine(256, runs_ahead=runs_ahead, on_step=on_step)
        self.said: list[Emission | HandedOver] = []
        self.ledger = Ledger(self.clock)
        self.progress = ProgressWatch(self.clock)
        instruments = Instruments(self.ledger, Failpoints(), self.progress)
        self.loop = DecodeLoop(self.engine, max_batch, instruments, self.said.extend, self.said.append)

    def run_of(self, asked: Request, num_claimed: int = 1, deadline: float | None = None) -> StreamRun:
        """Claimed: the prompt's rows are there."""
        layout = self.engine.layout
        num_prompt_tokens = len(asked.prompt_token_ids)
        num_blocks = layout.num_blocks(num_prompt_tokens)
        num_all_blocks = layout.num_blocks(num_prompt_tokens + asked.sampling.max_tokens - 1)
        self.engine.pool.set_aside(num_all_blocks)
        table = self.engine.pool.allocate(num_blocks, from_set_aside=True)
        self.engine.fill(table, [*asked.prompt_token_ids, *expected(asked)[: num_claimed - 1]])
        run = StreamRun(asked, f"t-{asked.request_id}", 4096, deadline, table, num_all_blocks - num_blocks)
        run.begin([Token(token_id) for token_id in expected(asked)[:num_claimed]], 1)
        return run

    def join(self, asked: Request, deadline: float | None = None) -> StreamRun:
        run = self.run_of(asked, deadline=deadline)
        self.loop.take(JoinBatch(run, self.progress.num_steps))
        return run

    def turn(self, num_turns: int = 1) -> bool:
        """Whether there is more to do."""
        return [self.loop.turn(self.clock.now()) is not None for _ in range(num_turns)][-1]

    def run(self) -> None:
        while self.turn():
            pass

    def tokens(self, name: str) -> list[int]:
        """What the emissions of a stream gave, which have to come in order."""
        ids = [expected(request(name))[0]]
        for emission in self.emissions(name):
            assert emission.index == len(ids)
            ids += [token.id for token in emission.tokens]
        return ids

    def emissions(self, name: str) -> list[Emission]:
        return [one for one in self.said if isinstance(one, Emission) and one.transfer_id == f"t-{name}"]

    def end(self, name: str) -> Ended | None:
        """Why the stream ended; nothing may follow its end."""
        assert not any(emission.ended for emission in self.emissions(name)[:-1])
        return self.emissions(name)[-1].ended

    def check_nothing_left(self) -> None:
        assert len(self.loop._scheduler) == 0
        counts = self.engine.pool.counts()
        assert counts.referenced == counts.draining == 0
        check_partition(self.engine.pool)


@BOTH
def test_every_stream_gets_its_tokens_in_order_and_one_row_for_each(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    for name, length in (("a", 3), ("bb", 20), ("ccc", 33)):
        bench.join(request(name, length))
    bench.run()
    for name, length in (("a", 3), ("bb", 20), ("ccc", 33)):
        asked = request(name, length)
        got = [token.id for emission in bench.emissions(name) for token in emission.tokens]
        assert got == expected(asked)[1:]
        assert bench.end(name) == Ended(FinishReason.LENGTH)
    assert bench.engine.decoder.num_rows == [3] * 7
    bench.check_nothing_left()


def test_a_turn_asks_for_another_at_once_until_nothing_is_left() -> None:
    bench = Bench()
    assert not bench.turn()
    bench.join(request(max_tokens=3))
    assert bench.turn()
    assert not bench.turn()
    assert bench.progress.is_working
    assert not bench.turn()
    assert not bench.progress.is_working


@BOTH
def test_a_stream_that_joins_later_joins_at_the_next_step(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    bench.join(request("a"))
    bench.turn(2)
    bench.join(request("b"))
    bench.turn()
    assert bench.engine.decoder.num_rows == [1, 1, 2]
    bench.run()
    assert bench.tokens("b") == expected(request("b"))


def test_a_stream_beyond_the_batch_waits_for_a_place_and_the_ledger_says_how_long() -> None:
    bench = Bench(max_batch=1)
    bench.join(request("a", max_tokens=4))
    bench.join(request("b"))
    bench.turn()
    assert bench.loop.num_waiting == 1
    bench.run()
    assert bench.tokens("b") == expected(request("b"))
    joined = {event.request_id: event.fields["steps_waited"] for event in bench.ledger.read()}
    assert joined == {"a": "0", "b": "3"}


@BOTH
def test_a_stream_that_leaves_gives_nothing_more_and_its_blocks_outlive_the_step_that_reads_them(
    runs_ahead: bool,
) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    run = bench.join(request("a", max_tokens=40))
    bench.join(request("b"))
    bench.turn(3)
    num_tokens = len(bench.tokens("a"))
    bench.loop.take(LeaveBatch("t-a", CANCELLED))
    bench.loop._follow_commands()
    assert run.is_freed
    assert bench.engine.pool.counts().draining == (2 if runs_ahead else 0)
    bench.run()
    assert (len(bench.tokens("a")), bench.end("a")) == (num_tokens, CANCELLED)
    assert bench.tokens("b") == expected(request("b"))
    bench.check_nothing_left()


def test_leaving_twice_or_after_the_end_changes_nothing() -> None:
    bench = Bench()
    bench.join(request(max_tokens=2))
    bench.run()
    num_said = len(bench.said)
    for name in ("t-a", "t-unknown"):
        bench.loop.take(LeaveBatch(name, CANCELLED))
    bench.turn()
    assert len(bench.said) == num_said


@BOTH
def test_a_deadline_ends_a_stream_whether_it_runs_or_waits(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead, max_batch=1)
    soon = bench.clock.now() + 1.0
    bench.join(request("a", max_tokens=40), deadline=soon)
    bench.join(request("b", max_tokens=40), deadline=soon)
    bench.turn(3)
    bench.clock.advance(0.99)
    bench.turn()
    assert bench.end("a") is None
    bench.clock.advance(0.01)
    bench.run()
    assert bench.end("a") == bench.end("b") == Ended(FinishReason.DEADLINE)
    assert bench.tokens("a") == expected(request("a", max_tokens=40))[: len(bench.tokens("a"))]
    bench.check_nothing_left()


@BOTH
def test_a_hand_over_comes_after_every_token_and_the_run_goes_on_elsewhere(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    run = bench.join(request("a"))
    bench.turn(3)
    bench.loop.take(HandOver("t-a", 5))
    bench.loop.take(HandOver("t-a", 6))
    bench.turn()
    handed_over = [one for one in bench.said if isinstance(one, HandedOver)]
    assert handed_over == [HandedOver(5, run), HandedOver(6, None)]
    before = bench.said[: bench.said.index(handed_over[0])]
    assert len(before) == len(bench.emissions("a")) == 3
    assert run.token_ids == bench.tokens("a") == expected(request("a"))[:4]
    assert not bench.loop._steps

    bench.loop.take(JoinBatch(run, 0))
    bench.run()
    assert bench.tokens("a") == expected(request("a"))
    bench.check_nothing_left()


@BOTH
@pytest.mark.parametrize("num_emitted", [1, 2, 5, 7])
def test_replay_computes_emitted_tokens_together_and_goes_on(runs_ahead: bool, num_emitted: int) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    plain = request("a")
    bench.join(replace(plain, emitted_token_ids=tuple(expected(plain)[:num_emitted])))
    bench.run()
    assert bench.tokens("a") == expected(plain)
    assert bench.engine.decoder.num_rows == [num_emitted, *[1] * (7 - num_emitted)]


def test_replay_beside_a_running_stream_is_bounded_in_each_step() -> None:
    bench = Bench()
    long = request("a", max_tokens=200)
    bench.join(replace(long, emitted_token_ids=tuple(expected(long)[:100])))
    bench.join(request("b"))
    bench.turn(2)
    assert bench.engine.decoder.num_rows == [1 + MAX_EXTRA_ROWS + 1, 100 - MAX_EXTRA_ROWS - 1 + 1]
    bench.run()
    assert [token.id for one in bench.emissions("a") for token in one.tokens] == expected(long)[1:]
    assert bench.tokens("b") == expected(request("b"))


def test_the_oldest_of_two_streams_that_replay_replays_the_most() -> None:
    bench = Bench()
    asked = {name: request(name, max_tokens=200) for name in ("a", "bb")}
    for one in asked.values():
        bench.join(replace(one, emitted_token_ids=tuple(expected(one)[:50])))
    bench.turn(2)
    assert bench.engine.decoder.num_rows == [50 + 1 + MAX_EXTRA_ROWS - 49, 1 + 50 - (1 + MAX_EXTRA_ROWS - 49)]
    bench.run()
    for name, one in asked.items():
        assert [token.id for emission in bench.emissions(name) for token in emission.tokens] == expected(one)[1:]


@BOTH
@pytest.mark.parametrize("wrong", [1, 4])
def test_a_replayed_token_that_differs_ends_the_stream_after_those_before_it(runs_ahead: bool, wrong: int) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    plain = request("a")
    ids = expected(plain)[:6]
    emitted = tuple(token_id + (index == wrong) for index, token_id in enumerate(ids))
    bench.join(replace(plain, emitted_token_ids=emitted))
    bench.run()
    ended = bench.end("a")
    assert ended is not None
    assert (ended.finish_reason, ended.reason) == (FinishReason.ERROR, "REPLAY_MISMATCH")
    assert bench.tokens("a") == ids[:wrong]
    bench.check_nothing_left()


@BOTH
def test_a_step_that_fails_ends_its_streams_and_the_loop_goes_on(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead, fails_at=3)
    bench.join(request("a"))
    bench.run()
    ended = bench.end("a")
    assert ended is not None
    assert (ended.finish_reason, ended.reason) == (FinishReason.ERROR, "INTERNAL")
    assert bench.tokens("a") == expected(request("a"))[:3]
    bench.join(request("b"))
    bench.run()
    assert bench.tokens("b") == expected(request("b"))
    bench.check_nothing_left()


@BOTH
def test_logits_that_are_not_finite_end_their_stream_alone(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead)
    bench.engine.decoder.non_finite.add(("a", 3))
    for name in ("a", "b"):
        bench.join(request(name))
    bench.run()
    ended = bench.end("a")
    assert ended is not None
    assert ended.reason == "NON_FINITE_LOGITS"
    assert bench.tokens("a") == expected(request("a"))[:3]
    assert bench.tokens("b") == expected(request("b"))
    bench.check_nothing_left()


def test_no_step_is_launched_ahead_of_a_token_that_the_host_has_to_know() -> None:
    bench = Bench(runs_ahead=True)
    bench.join(request("a", repetition_penalty=1.2))
    bench.turn()
    assert len(bench.emissions("a")) == 1
    bench.join(request("b"))
    bench.turn()
    assert len(bench.emissions("a")) == 2
    bench.run()
    assert bench.tokens("b") == expected(request("b"))


@BOTH
def test_closing_ends_what_is_left_as_cancelled_with_its_tokens(runs_ahead: bool) -> None:
    bench = Bench(runs_ahead=runs_ahead, max_batch=1)
    for name in ("a", "b"):
        bench.join(request(name))
    bench.turn(3)
    bench.join(request("ccc"))
    bench.loop.close(bench.clock.now())
    for name in ("a", "b", "ccc"):
        ended = bench.end(name)
        assert ended is not None
        assert ended.finish_reason is FinishReason.CANCELLED
    assert bench.tokens("a") == expected(request("a"))[:4]
    bench.check_nothing_left()


def test_what_a_stream_computes_next_is_a_value() -> None:
    bench = Bench()
    plain = request("a")
    run = bench.run_of(replace(plain, emitted_token_ids=tuple(expected(plain)[:5])))
    replay = next_work(run, 2, None)
    assert replay == Replay(run, first=1, num_rows=3)
    rest = next_work(run, 64, replay.ahead(first_row=4))
    assert rest == Replay(run, first=4, num_rows=2)
    assert rest.ahead(first_row=9).last == FromPrevious(10)
    after = next_work(run, 64, replay.ahead(4)._replace(num_tokens=5, last=FromPrevious(3)))
    assert after == Continue(run, FromPrevious(3), num_tokens=6)
    assert next_work(run, 64, replay.ahead(4)._replace(num_tokens=7)) is None
    run.free(bench.engine.pool)
