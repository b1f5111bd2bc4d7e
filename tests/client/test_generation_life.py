"""Generations that break in every way, as their core sees it: whole, once, in order, whatever the calls bring."""

import itertools
import random
from collections.abc import Iterator

import grpc
import pytest

from isthmus.client import Generation
from isthmus.client.generation_life import ReadResponse
from isthmus.client.retries import MAX_BACKOFF_S, MIN_BACKOFF_S
from isthmus.client.router_call import RouterCall
from isthmus.errors import (
    AttachedElsewhere,
    DataLoss,
    DeadlinePassed,
    Draining,
    IndexOutOfRange,
    InvalidRequest,
    IsthmusError,
    ModelNotFound,
    NoFreeBlocks,
    NonFiniteLogits,
    NumericsMismatch,
    Overloaded,
    RequestCancelled,
    RequestKillsWorkers,
    SlowClient,
    StreamGone,
    TransferIncomplete,
    WorkerLost,
    WorkersUnavailable,
)
from isthmus.types import FinishReason
from tests.client.routers import LENGTH, accepted, chunk, finished, logprob, token, whole_text
from tests.client.virtual_routers import (
    SEED,
    Event,
    Script,
    Silence,
    Told,
    VirtualClient,
    VirtualRouter,
    breaks,
    hangs,
    lost,
    refuses,
    unanswered,
)

CODE = grpc.StatusCode


def assert_whole(generation: Generation, seed: int = SEED) -> None:
    assert generation.text == whole_text()
    assert generation.token_ids == [token(seed, index).id for index in range(LENGTH)]
    assert [one.logprob for one in generation.tokens] == [logprob(index) for index in range(LENGTH)]
    assert generation.finished == finished().finished


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.INTERNAL, CODE.UNKNOWN, CODE.CANCELLED], ids=lambda c: c.name)
def test_a_broken_stream_is_resumed_at_the_next_index(code: grpc.StatusCode) -> None:
    router = VirtualRouter(breaks(lost(code), after=3), breaks(lost(code), after=4))
    generation = VirtualClient(router).complete()
    assert_whole(generation)
    assert (router.kinds, generation.num_resumes, generation.request_ids) == ("GRR", 2, ["r-0"])
    assert [(one.request_id, one.next_index) for one in router.requests[1:]] == [("r-0", 3), ("r-0", 7)]
    assert router.cancelled == []


@pytest.mark.parametrize(
    "error", [Draining("d"), WorkerLost("w"), TransferIncomplete("t"), WorkersUnavailable("u"), Overloaded("o")]
)
def test_a_stream_its_router_gives_up_is_resumed(error: IsthmusError) -> None:
    router = VirtualRouter(refuses(error, after=3))
    assert_whole(VirtualClient(router).complete())
    assert router.kinds == "GR"


def test_a_stream_that_ends_without_its_end_is_resumed() -> None:
    def stops(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, 0, 2)

    router = VirtualRouter(stops)
    assert_whole(VirtualClient(router).complete())
    assert router.kinds == "GR"


@pytest.mark.parametrize("seed", range(200))
def test_any_order_of_breakdowns_gives_the_same_stream(seed: int) -> None:
    dice = random.Random(seed)

    def breakdown() -> Script:
        after = dice.choice([0, 0, 1, 2])
        code = dice.choice([CODE.UNAVAILABLE, CODE.INTERNAL, CODE.CANCELLED, CODE.UNKNOWN])
        error = dice.choice([WorkerLost("w"), Draining("d"), TransferIncomplete("t")])
        cuts = dice.choice([breaks(lost(code), after=after), refuses(error, after=dice.choice([None, after]))])
        gone = refuses(dice.choice([StreamGone("g"), IndexOutOfRange("i")]))
        if dice.random() < 0.5:
            return cuts
        return lambda told: (gone if told.is_resume else cuts)(told)

    routers = [VirtualRouter(*(breakdown() for _ in range(6)), name=name) for name in "rs"]
    client = VirtualClient(*routers, chance=seed)
    for _ in range(3):
        assert_whole(client.complete())
    assert [router.cancelled for router in routers] == [[], []]


def test_a_broken_call_is_dropped_before_the_next_is_made() -> None:
    def out_of_order(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, 3, 4)

    router = VirtualRouter(out_of_order, breaks(after=2))
    client = VirtualClient(router)
    assert_whole(client.complete())
    assert (router.kinds, client.num_dropped) == ("GRR", 3)


def test_a_call_that_breaks_before_it_is_accepted_is_made_again() -> None:
    router = VirtualRouter(unanswered, unanswered)
    assert_whole(VirtualClient(router).complete())
    assert router.kinds == "GGG"
    assert len({one.SerializeToString(deterministic=True) for one in router.requests}) == 1


def test_the_seed_is_minted_before_the_first_call() -> None:
    router = VirtualRouter(breaks(after=0), refuses(StreamGone("gone")))
    generation = VirtualClient(router).complete(seed=None)
    asked = [call.message.sampling.seed for call in router.calls if call.method == "Generate"]
    assert asked == [generation.seed] * 2
    assert_whole(generation, generation.seed)


@pytest.mark.parametrize("error", [StreamGone("gone"), IndexOutOfRange("not so far")])
def test_a_stream_nobody_holds_goes_on_from_its_tokens(error: IsthmusError) -> None:
    router = VirtualRouter(breaks(after=5), refuses(error), breaks(after=2))
    generation = VirtualClient(router).complete(max_tokens=LENGTH)
    assert_whole(generation)
    assert (router.kinds, generation.request_ids, generation.num_resumes) == ("GRGR", ["r-0", "r-2"], 2)
    begun = router.requests[0]
    again = router.requests[2]
    assert list(begun.emitted_token_ids) == []
    assert list(again.emitted_token_ids) == [token(SEED, index).id for index in range(5)]
    assert again.sampling == begun.sampling
    assert (again.prompt, again.on_disconnect) == (begun.prompt, begun.on_disconnect)


def test_a_stream_of_which_only_the_end_was_missing_goes_on_without_a_worker() -> None:
    def has_nothing_to_compute(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed, numerics="")
        yield finished()

    router = VirtualRouter(breaks(after=LENGTH), refuses(StreamGone("gone")), has_nothing_to_compute)
    assert_whole(VirtualClient(router).complete())


def test_tokens_given_at_the_start_count() -> None:
    emitted = [token(SEED, index).id for index in range(4)]
    router = VirtualRouter(breaks(after=2), refuses(StreamGone("gone")))
    generation = VirtualClient(router).complete(emitted_token_ids=emitted)
    assert generation.token_ids == [token(SEED, index).id for index in range(4, LENGTH)]
    assert router.requests[1].next_index == 6
    assert list(router.requests[2].emitted_token_ids) == [token(SEED, index).id for index in range(6)]


def test_repeated_tokens_are_dropped_and_missing_ones_asked_for() -> None:
    def stutters(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        for start, end in ((0, 2), (0, 1), (1, 2), (2, 4), (0, 4)):
            yield chunk(told.seed, start, end)
        yield chunk(told.seed, 5, 6)

    def overlaps(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, told.position - 1, told.position + 1)

    router = VirtualRouter(stutters, overlaps)
    assert_whole(VirtualClient(router).complete())
    assert [one.next_index for one in router.requests[1:]] == [4, 4]


def test_a_repeated_token_that_differs_is_data_loss() -> None:
    def differs(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, 0, 3)
        yield chunk(told.seed + 1, 1, 2)

    router = VirtualRouter(differs)
    with pytest.raises(DataLoss):
        VirtualClient(router).complete()
    assert router.cancelled == ["r-0"]


def test_a_stream_never_goes_on_with_other_bits() -> None:
    def of_another_class(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed, numerics="other")

    router = VirtualRouter(breaks(after=5), refuses(StreamGone("gone")), of_another_class)
    with pytest.raises(NumericsMismatch):
        VirtualClient(router).complete()
    assert router.cancelled == ["r-2"]


FINAL = [
    InvalidRequest.of("sampling.top_p", 2, "(0, 1]"),
    ModelNotFound("no such model"),
    DataLoss("differs"),
    DeadlinePassed("late"),
    RequestKillsWorkers("two workers"),
    NonFiniteLogits("nan"),
    AttachedElsewhere("another call"),
    RequestCancelled("by another"),
    SlowClient("slow"),
    IsthmusError("internal error 1f"),
]


@pytest.mark.parametrize("after", [None, 3], ids=["at once", "mid-stream"])
@pytest.mark.parametrize("error", FINAL, ids=lambda error: error.reason)
def test_errors_of_the_request_are_raised_as_they_are(error: IsthmusError, after: int | None) -> None:
    router = VirtualRouter(refuses(error, after=after))
    with pytest.raises(type(error)) as raised:
        VirtualClient(router).complete()
    assert raised.value.reason == error.reason
    assert raised.value.violations == error.violations
    assert (router.kinds, router.cancelled) == ("G", [])


@pytest.mark.parametrize("after", [None, 0], ids=["before", "after accepted"])
@pytest.mark.parametrize("error", [Overloaded, NoFreeBlocks, WorkersUnavailable], ids=lambda error: error.reason)
def test_a_refusal_is_asked_again_no_sooner_than_the_router_says(error: type[IsthmusError], after: int | None) -> None:
    router = VirtualRouter(refuses(error("later", retry_after_s=0.4), after=after))
    assert_whole(VirtualClient(router).complete())
    first, second = router.called_at
    assert second - first == pytest.approx(0.4)
    assert router.kinds == "GG"


def test_a_late_resume_of_our_own_is_not_another_reader() -> None:
    """A router that froze with our Resume unread carries it out when it wakes: once."""
    elsewhere = refuses(AttachedElsewhere("another call"), after=2)
    router = VirtualRouter(breaks(after=2), unanswered, elsewhere)
    assert_whole(VirtualClient(router).complete())
    assert router.kinds == "GRRR"
    router = VirtualRouter(breaks(after=2), unanswered, elsewhere, elsewhere)
    with pytest.raises(AttachedElsewhere):
        VirtualClient(router).complete()


def test_a_refusal_that_outlasts_the_deadline_is_raised_at_once() -> None:
    client = VirtualClient(VirtualRouter(refuses(Overloaded("full", retry_after_s=5))))
    began = client.time.now()
    with pytest.raises(Overloaded):
        client.complete(timeout_s=3)
    assert client.time.now() == began


def test_a_draining_router_is_left_for_another() -> None:
    draining: list[Script] = [refuses(Draining("draining", retry_after_s=30.0))] * 9
    client = VirtualClient(VirtualRouter(*draining), VirtualRouter(name="s"))
    began = client.time.now()
    for _ in range(3):
        assert_whole(client.complete())
    assert client.time.now() - began < 3.0


def test_absent_routers_are_named() -> None:
    absent = [VirtualRouter(*[unanswered] * 99, name=name) for name in ("a:1", "b:2")]
    client = VirtualClient(*absent, router_timeout_s=0.5)
    began = client.time.now()
    with pytest.raises(WorkersUnavailable, match=r"no router answers at a:1, b:2"):
        client.complete()
    assert 0.5 < client.time.now() - began < 0.5 + MAX_BACKOFF_S


def test_each_call_gets_the_time_that_is_left() -> None:
    def slow(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        yield Silence(0.5)
        yield lost()

    router = VirtualRouter(slow, slow, slow)
    assert_whole(VirtualClient(router).complete(timeout_s=6))
    remaining = [call.timeout_s for call in router.calls]
    assert remaining[0] == 6
    assert all(
        before - after == pytest.approx(later - earlier)
        for (before, after), (earlier, later) in zip(
            itertools.pairwise(remaining), itertools.pairwise(router.called_at), strict=True
        )
    )
    assert all(0.5 + MIN_BACKOFF_S / 2 <= before - after <= 1.0 for before, after in itertools.pairwise(remaining))


def test_the_deadline_ends_a_search_for_a_router() -> None:
    router = VirtualRouter(breaks(after=3), *[unanswered] * 99)
    client = VirtualClient(router, router_timeout_s=0.1)
    began = client.time.now()
    with pytest.raises(DeadlinePassed):
        client.complete(timeout_s=1.5)
    assert 1.5 - MAX_BACKOFF_S <= client.time.now() - began <= 1.5


def test_the_deadline_ends_a_silent_stream() -> None:
    router = VirtualRouter(hangs(after=3))
    client = VirtualClient(router)
    began = client.time.now()
    with pytest.raises(DeadlinePassed):
        client.complete(timeout_s=0.5)
    assert client.time.now() - began == pytest.approx(0.5)
    assert client.num_dropped == 0, "the stream lets go of its call when it is closed"


def test_a_generation_is_cancelled_once_and_no_call_follows() -> None:
    router = VirtualRouter(breaks(after=3))
    client = VirtualClient(router)
    life = client.generate()
    client.read(life, until=lambda generation: len(generation.tokens) == 3)
    cancellation = client.cancel(life)
    assert cancellation is not None
    assert cancellation.was_known
    assert client.cancel(life) is None
    assert (router.cancelled, life.generation.finish_reason) == (["r-0"], FinishReason.CANCELLED)
    while (step := life.next_step(client.time.now())) is not None:
        assert isinstance(step, ReadResponse)
        life.call_ended(lost(CODE.CANCELLED), client.time.now())
        life.next_step(client.time.now())  # the call is dropped
    assert router.kinds == "G"


def test_what_was_made_before_a_cancel_is_delivered_with_its_end() -> None:
    client = VirtualClient(VirtualRouter())
    life = client.generate()
    client.read(life, until=lambda _: True)
    life.cancel()
    now = client.time.now()
    assert isinstance(life.next_step(now), ReadResponse)
    assert life.received(chunk(SEED, 1, 3), now) is not None
    assert life.received(finished(), now) is not None
    assert len(life.generation.tokens) == 3
    assert life.generation.finish_reason is FinishReason.LENGTH, "the router's word counts"


def test_an_id_is_awaited_while_the_first_call_is_open() -> None:
    client = VirtualClient(VirtualRouter())
    life = client.generate()
    now = client.time.now()
    assert not life.awaits_id
    assert isinstance(life.next_step(now), RouterCall)
    assert life.awaits_id
    life.received(accepted("r-0", SEED), now)
    assert not life.awaits_id
    life.call_ended(lost(), now)
    steps = [life.next_step(now) for _ in range(3)]
    assert isinstance(steps[-1], RouterCall)
    assert steps[-1].method == "Resume"
    assert not life.awaits_id, "a stream that is resumed is known"


def test_a_generation_nobody_accepted_has_nobody_to_tell() -> None:
    client = VirtualClient(VirtualRouter())
    life = client.generate()
    life.next_step(client.time.now())
    life.cancel()
    assert life.cancellation(client.time.now()).next_call(client.time.now()) is None


def test_a_deadline_that_passed_before_the_first_call_is_raised() -> None:
    client = VirtualClient(VirtualRouter())
    life = client.generate(timeout_s=1)
    client.time.run_for(2)
    with pytest.raises(DeadlinePassed):
        client.read(life)
