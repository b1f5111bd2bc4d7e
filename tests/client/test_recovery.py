"""Streams that break in every way, read by both clients: the caller sees one stream, whole, once, with equal bits."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest

from isthmus.client import RETENTION_S, AsyncClient, Chunk, Client, Generation
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
from isthmus.v1 import inference_pb2, types_pb2
from tests.client.routers import (
    LENGTH,
    Router,
    Script,
    Told,
    accepted,
    addresses,
    breaks,
    chunk,
    finished,
    hangs,
    logprob,
    refuses,
    relayed,
    serving,
    token,
    whole_text,
)

SEED = 2**63 + 11
CODE = grpc.StatusCode
Complete = Callable[..., Any]


@pytest.fixture(params=["asyncio", "blocking"])
def complete(request: pytest.FixtureRequest) -> Complete:
    """Reads one generation to its end; pieces and chunks are checked against the result on the way."""
    if request.param == "asyncio":
        return complete_asyncio
    return lambda *args, **options: asyncio.to_thread(complete_blocking, *args, **options)


class Reached:
    """Set once the caller has so many tokens: what a router has sent may still be on its way."""

    def __init__(self, num_tokens: int):
        self._loop, self._event, self._left = asyncio.get_running_loop(), asyncio.Event(), num_tokens

    def note(self, one: Chunk) -> None:
        """From whichever thread reads."""
        self._left -= len(one.tokens)
        if self._left <= 0:
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await asyncio.wait_for(self._event.wait(), 10)


OnChunk = Callable[[Chunk], None]


def ignore(_: Chunk) -> None:
    return


async def complete_asyncio(
    routers: Sequence[str], *, router_timeout_s: float = 10.0, on_chunk: OnChunk = ignore, **options: Any
) -> Generation:
    chunks = []
    async with AsyncClient(routers, router_timeout_s=router_timeout_s) as client:
        stream = client.generate("Once", **{"seed": SEED, "logprobs": 1, "timeout_s": 20, **options})
        async for one in stream.chunks():
            assert stream.result.text.endswith(one.text), "told before it is recorded"
            chunks.append(one)
            on_chunk(one)
    return checked(stream.result, chunks)


def complete_blocking(
    routers: Sequence[str], *, router_timeout_s: float = 10.0, on_chunk: OnChunk = ignore, **options: Any
) -> Generation:
    chunks = []
    with Client(routers, router_timeout_s=router_timeout_s) as client:
        stream = client.generate("Once", **{"seed": SEED, "logprobs": 1, "timeout_s": 20, **options})
        for one in stream.chunks():
            chunks.append(one)
            on_chunk(one)
    return checked(stream.result, chunks)


def checked(generation: Generation, chunks: Sequence[Any]) -> Generation:
    """What was yielded is what is recorded, in order and once."""
    assert [one for piece in chunks for one in piece.tokens] == generation.tokens
    assert "".join(piece.text for piece in chunks) == generation.text
    position = 0
    for piece in chunks:
        assert piece.index == position
        position += len(piece.tokens)
    return generation


def assert_whole(generation: Generation, seed: int = SEED) -> None:
    assert generation.text == whole_text()
    assert generation.token_ids == [token(seed, index).id for index in range(LENGTH)]
    assert [one.logprob for one in generation.tokens] == [logprob(index) for index in range(LENGTH)]
    assert [one.top_logprobs for one in generation.tokens] == [((i, logprob(i)),) for i in range(LENGTH)]
    assert generation.finished == finished().finished


async def test_an_unbroken_stream_is_one_call_that_can_be_resumed(complete: Complete) -> None:
    router = Router()
    async with addresses(router) as routers:
        generation = await complete(routers, max_tokens=5, tenant="t", priority=-2, client_request_id="mine")
    assert_whole(generation)
    assert generation.request_ids == ["r-0"]
    assert (generation.num_resumes, router.cancelled, router.kinds) == (0, [], "G")
    asked = router.asked[0].request
    assert asked.on_disconnect == types_pb2.ON_DISCONNECT_RETAIN
    assert asked.retention_s == RETENTION_S
    assert (asked.tenant, asked.priority, asked.client_request_id, asked.sampling.max_tokens) == ("t", -2, "mine", 5)


async def test_the_seed_is_minted_before_the_first_call(complete: Complete) -> None:
    router = Router(breaks(CODE.UNAVAILABLE, after=0), refuses(StreamGone("gone")))
    async with addresses(router) as routers:
        generation = await complete(routers, seed=None)
    assert [one.request.sampling.seed for one in router.asked if not one.is_resume] == [generation.seed] * 2
    assert_whole(generation, generation.seed)


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.INTERNAL, CODE.UNKNOWN, CODE.CANCELLED], ids=lambda c: c.name)
async def test_a_broken_stream_is_resumed_at_the_next_index(complete: Complete, code: grpc.StatusCode) -> None:
    router = Router(breaks(code, after=3), breaks(code, after=4))
    async with addresses(router) as routers:
        generation = await complete(routers)
    assert_whole(generation)
    assert (router.kinds, generation.num_resumes, generation.request_ids) == ("GRR", 2, ["r-0"])
    resumes = [(one.request.request_id, one.request.next_index) for one in router.asked[1:]]
    assert resumes == [("r-0", 3), ("r-0", 7)]


@pytest.mark.parametrize(
    "error", [Draining("d"), WorkerLost("w"), TransferIncomplete("t"), WorkersUnavailable("u"), Overloaded("o")]
)
async def test_a_stream_its_router_gives_up_is_resumed(complete: Complete, error: IsthmusError) -> None:
    router = Router(refuses(error, after=3))
    async with addresses(router) as routers:
        generation = await complete(routers)
    assert_whole(generation)
    assert router.kinds == "GR"


async def test_a_stream_that_ends_without_its_end_is_resumed(complete: Complete) -> None:
    async def stops(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, 0, 2)

    router = Router(stops)
    async with addresses(router) as routers:
        assert_whole(await complete(routers))
    assert router.kinds == "GR"


async def test_a_reset_connection_is_resumed_at_another_router(complete: Complete) -> None:
    first, second = Router(hangs(after=3)), Router(name="s")
    second.seed = SEED
    async with relayed(first) as (relay, address), serving(second) as port:
        reached = Reached(3)
        reading = asyncio.ensure_future(complete([address, f"127.0.0.1:{port}"], on_chunk=reached.note))
        await reached.wait()
        relay.cut()
        began = time.monotonic()
        assert_whole(await reading)
    assert time.monotonic() - began < 1.0
    assert (first.kinds, second.kinds) == ("G", "R")
    assert second.asked[0].request.next_index <= 3


async def test_a_frozen_router_is_left_within_keepalive_time(complete: Complete) -> None:
    first, second = Router(hangs(after=3)), Router()
    second.seed = SEED
    async with relayed(first) as (relay, address), serving(second) as port:
        reached = Reached(3)
        reading = asyncio.ensure_future(complete([address, f"127.0.0.1:{port}"], on_chunk=reached.note))
        await reached.wait()
        relay.freeze()
        began = time.monotonic()
        assert_whole(await reading)
    assert time.monotonic() - began < 4.0
    assert second.kinds == "R"


@pytest.mark.parametrize("seed", range(8))
async def test_any_order_of_breakdowns_gives_the_same_stream(complete: Complete, seed: int) -> None:
    dice = random.Random(seed)

    def breakdown() -> Script:
        after = dice.choice([0, 0, 1, 2])
        code = dice.choice([CODE.UNAVAILABLE, CODE.INTERNAL, CODE.CANCELLED, CODE.UNKNOWN])
        lost = dice.choice([WorkerLost("w"), Draining("d"), TransferIncomplete("t")])
        cuts = dice.choice([breaks(code, after=after), refuses(lost, after=dice.choice([None, after]))])
        gone = refuses(dice.choice([StreamGone("g"), IndexOutOfRange("i")]))
        if dice.random() < 0.5:
            return cuts
        return lambda told: (gone if told.asked.is_resume else cuts)(told)

    routers = [Router(*(breakdown() for _ in range(6)), name=name) for name in "rs"]
    for router in routers:
        router.seed = SEED
    async with addresses(*routers) as given:
        for generation in await asyncio.gather(*(complete(given) for _ in range(3))):
            assert_whole(generation)


async def test_a_router_that_is_restarted_goes_on(complete: Complete) -> None:
    before, after = Router(hangs(after=3)), Router()
    after.seed = SEED
    async with serving(before) as port:
        reading = asyncio.ensure_future(complete([f"127.0.0.1:{port}"]))
        await before.silent.wait()
    await asyncio.sleep(0.5)  # nobody listens for so long
    async with serving(after, port):
        assert_whole(await asyncio.wait_for(reading, 5))
    assert after.kinds == "R"


async def test_a_call_that_breaks_before_it_is_accepted_is_made_again(complete: Complete) -> None:
    async def never_accepts(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        await told.abort(CODE.UNAVAILABLE)
        yield finished()

    router = Router(never_accepts, never_accepts)
    async with addresses(router) as routers:
        assert_whole(await complete(routers))
    assert router.kinds == "GGG"
    assert len({one.request.SerializeToString(deterministic=True) for one in router.asked}) == 1


@pytest.mark.parametrize("error", [StreamGone("gone"), IndexOutOfRange("not so far")])
async def test_a_stream_nobody_holds_goes_on_from_its_tokens(complete: Complete, error: IsthmusError) -> None:
    router = Router(breaks(CODE.UNAVAILABLE, after=5), refuses(error), breaks(CODE.UNAVAILABLE, after=2))
    async with addresses(router) as routers:
        generation = await complete(routers, max_tokens=LENGTH)
    assert_whole(generation)
    assert (router.kinds, generation.request_ids, generation.num_resumes) == ("GRGR", ["r-0", "r-2"], 2)
    begun, again = router.asked[0].request, router.asked[2].request
    assert list(again.emitted_token_ids) == [token(SEED, index).id for index in range(5)]
    assert again.sampling == begun.sampling
    assert (again.prompt, again.on_disconnect) == (begun.prompt, begun.on_disconnect)


async def test_a_stream_of_which_only_the_end_was_missing_goes_on_without_a_worker(complete: Complete) -> None:
    async def has_nothing_to_compute(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed, numerics="")
        yield finished()

    router = Router(breaks(CODE.UNAVAILABLE, after=LENGTH), refuses(StreamGone("gone")), has_nothing_to_compute)
    async with addresses(router) as routers:
        assert_whole(await complete(routers))


async def test_tokens_given_at_the_start_count() -> None:
    emitted = [token(SEED, index).id for index in range(4)]
    router = Router(breaks(CODE.UNAVAILABLE, after=2), refuses(StreamGone("gone")))
    async with addresses(router) as routers, AsyncClient(routers) as client:
        generation = await client.complete("Once", seed=SEED, emitted_token_ids=emitted)
    assert generation.token_ids == [token(SEED, index).id for index in range(4, LENGTH)]
    assert router.asked[1].request.next_index == 6
    assert list(router.asked[2].request.emitted_token_ids) == [token(SEED, index).id for index in range(6)]


async def test_repeated_tokens_are_dropped_and_missing_ones_asked_for(complete: Complete) -> None:
    async def stutters(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        for start, end in ((0, 2), (0, 1), (1, 2), (2, 4), (0, 4)):
            yield chunk(told.seed, start, end)
        yield chunk(told.seed, 5, 6)

    async def overlaps(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, told.position - 1, told.position + 1)

    router = Router(stutters, overlaps)
    async with addresses(router) as routers:
        assert_whole(await complete(routers))
    assert [one.request.next_index for one in router.asked[1:]] == [4, 4]


async def test_a_repeated_token_that_differs_is_data_loss(complete: Complete) -> None:
    async def differs(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, 0, 3)
        yield chunk(told.seed + 1, 1, 2)
        await asyncio.Event().wait()

    router = Router(differs)
    async with addresses(router) as routers:
        with pytest.raises(DataLoss):
            await complete(routers)
    assert router.cancelled == ["r-0"]


async def test_a_stream_never_goes_on_with_other_bits(complete: Complete) -> None:
    async def of_another_class(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed, numerics="other")
        await asyncio.Event().wait()

    router = Router(breaks(CODE.UNAVAILABLE, after=5), refuses(StreamGone("gone")), of_another_class)
    async with addresses(router) as routers:
        with pytest.raises(NumericsMismatch):
            await complete(routers)
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
async def test_errors_of_the_request_are_raised_as_they_are(
    complete: Complete, error: IsthmusError, after: int | None
) -> None:
    router = Router(refuses(error, after=after))
    async with addresses(router) as routers:
        with pytest.raises(type(error)) as raised:
            await complete(routers)
    assert raised.value.reason == error.reason
    assert raised.value.violations == error.violations
    assert (router.kinds, router.cancelled) == ("G", [])


@pytest.mark.parametrize("after", [None, 0], ids=["before", "after accepted"])
@pytest.mark.parametrize("error", [Overloaded, NoFreeBlocks, WorkersUnavailable], ids=lambda error: error.reason)
async def test_a_refusal_is_asked_again_no_sooner_than_the_router_says(
    complete: Complete, error: type[IsthmusError], after: int | None
) -> None:
    router = Router(refuses(error("later", retry_after_s=0.4), after=after))
    async with addresses(router) as routers:
        began = time.monotonic()
        assert_whole(await complete(routers))
    assert 0.4 <= time.monotonic() - began < 2.0
    assert router.kinds == "GG"


async def test_a_late_resume_of_our_own_is_not_another_reader(complete: Complete) -> None:
    """A router that froze with our Resume unread carries it out when it wakes: once."""

    async def unanswered(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        await told.abort(CODE.UNAVAILABLE)
        yield finished()

    elsewhere = refuses(AttachedElsewhere("another call"), after=2)
    router = Router(breaks(CODE.UNAVAILABLE, after=2), unanswered, elsewhere)
    async with addresses(router) as routers:
        assert_whole(await complete(routers))
    assert router.kinds == "GRRR"
    router = Router(breaks(CODE.UNAVAILABLE, after=2), unanswered, elsewhere, elsewhere)
    async with addresses(router) as routers:
        with pytest.raises(AttachedElsewhere):
            await complete(routers)


async def test_a_refusal_that_outlasts_the_deadline_is_raised_at_once(complete: Complete) -> None:
    router = Router(refuses(Overloaded("full", retry_after_s=5)))
    async with addresses(router) as routers:
        began = time.monotonic()
        with pytest.raises(Overloaded):
            await complete(routers, timeout_s=3)
    assert time.monotonic() - began < 1.0


async def test_a_draining_router_is_left_for_another(complete: Complete) -> None:
    draining: list[Script] = [refuses(Draining("draining", retry_after_s=30.0))] * 9
    first, second = Router(*draining), Router()
    async with addresses(first, second) as routers:
        began = time.monotonic()
        for _ in range(3):
            assert_whole(await complete(routers))
    assert time.monotonic() - began < 3.0


async def test_absent_routers_are_named(complete: Complete) -> None:
    began = time.monotonic()
    with pytest.raises(WorkersUnavailable, match=r"no router answers at 127.0.0.1:1, 127.0.0.1:2"):
        await complete(["127.0.0.1:1", "127.0.0.1:2"], router_timeout_s=0.5)
    assert time.monotonic() - began < 2.5


async def test_each_call_gets_the_time_that_is_left(complete: Complete) -> None:
    remaining: list[float] = []

    async def slow(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        remaining.append(told.asked.context.time_remaining())
        yield accepted(told.request_id, told.seed)
        await asyncio.sleep(0.5)  # the time that is used up
        await told.abort(CODE.UNAVAILABLE)

    router = Router(slow, slow, slow)
    async with addresses(router) as routers:
        assert_whole(await complete(routers, timeout_s=6))
    assert 5 < remaining[0] <= 6.1  # sent rounded up
    assert all(0.4 < before - after < 2 for before, after in itertools.pairwise(remaining))


async def test_the_deadline_ends_a_search_for_a_router(complete: Complete) -> None:
    router = Router(hangs(after=3))
    async with serving(router) as port:
        reading = asyncio.ensure_future(complete([f"127.0.0.1:{port}"], timeout_s=1.5, router_timeout_s=0.1))
        began = time.monotonic()
        await router.silent.wait()
    with pytest.raises(DeadlinePassed):
        await reading
    assert 0.9 < time.monotonic() - began < 2.5


async def test_the_deadline_ends_a_silent_stream(complete: Complete) -> None:
    router = Router(hangs(after=3))
    async with addresses(router) as routers:
        began = time.monotonic()
        with pytest.raises(DeadlinePassed):
            await complete(routers, timeout_s=0.5)
        assert time.monotonic() - began < 1.5
        await asyncio.wait_for(router.asked[0].ended.wait(), 2)


async def test_values_a_message_cannot_hold_are_refused_here(complete: Complete) -> None:
    for options in ({"seed": -1}, {"stop": 5}, {"token_ids": [1]}, {"max_tokens": "x"}):
        with pytest.raises(InvalidRequest):
            await complete(["127.0.0.1:1"], **options)
    with pytest.raises(TypeError, match="max_token"):
        await complete(["127.0.0.1:1"], max_token=5)
