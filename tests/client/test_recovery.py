"""Streams that break, read by both clients over real connections: the caller sees one stream, whole, with equal bits.

What only the core decides is tested in virtual time, in test_generation_life.py.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest

from isthmus.client import RETENTION_S, AsyncClient, Chunk, Client, Generation
from isthmus.errors import (
    DataLoss,
    DeadlinePassed,
    Draining,
    IndexOutOfRange,
    InvalidRequest,
    IsthmusError,
    Overloaded,
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
    return FACES[request.param]


class Reached:
    """Set once the caller has so many tokens: what a router has sent may still be on its way."""

    def __init__(self, num_tokens: int):
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._left = num_tokens

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


FACES: dict[str, Complete] = {
    "asyncio": complete_asyncio,
    "blocking": lambda *args, **options: asyncio.to_thread(complete_blocking, *args, **options),
}


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


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.CANCELLED], ids=lambda c: c.name)
async def test_a_broken_stream_is_resumed_at_the_next_index(complete: Complete, code: grpc.StatusCode) -> None:
    router = Router(breaks(code, after=3), breaks(code, after=4))
    async with addresses(router) as routers:
        generation = await complete(routers)
    assert_whole(generation)
    assert (router.kinds, generation.num_resumes, generation.request_ids) == ("GRR", 2, ["r-0"])
    resumes = [(one.request.request_id, one.request.next_index) for one in router.asked[1:]]
    assert resumes == [("r-0", 3), ("r-0", 7)]


async def test_a_stream_that_ends_without_its_end_is_resumed(complete: Complete) -> None:
    async def stops(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, 0, 2)

    router = Router(stops)
    async with addresses(router) as routers:
        assert_whole(await complete(routers))
    assert router.kinds == "GR"


async def test_a_reset_connection_is_resumed_at_another_router(complete: Complete) -> None:
    first = Router(hangs(after=3))
    second = Router(name="s")
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


async def test_a_frozen_router_is_left_within_keepalive_time() -> None:
    """Both clients at once, since each waits for its pings."""

    async def freeze_and_read(complete: Complete) -> None:
        first = Router(hangs(after=3))
        second = Router()
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

    await asyncio.gather(*(freeze_and_read(complete) for complete in FACES.values()))


@pytest.mark.parametrize("seed", range(2))
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
    before = Router(hangs(after=3))
    after = Router()
    after.seed = SEED
    async with serving(before) as port:
        reading = asyncio.ensure_future(complete([f"127.0.0.1:{port}"]))
        await before.silent.wait()
    await asyncio.sleep(0.5)  # nobody listens for so long
    async with serving(after, port):
        assert_whole(await asyncio.wait_for(reading, 5))
    assert after.kinds == "R"


async def test_a_stream_nobody_holds_goes_on_from_its_tokens(complete: Complete) -> None:
    router = Router(breaks(CODE.UNAVAILABLE, after=5), refuses(StreamGone("gone")), breaks(CODE.UNAVAILABLE, after=2))
    async with addresses(router) as routers:
        generation = await complete(routers, max_tokens=LENGTH)
    assert_whole(generation)
    assert (router.kinds, generation.request_ids, generation.num_resumes) == ("GRGR", ["r-0", "r-2"], 2)
    begun = router.asked[0].request
    again = router.asked[2].request
    assert list(again.emitted_token_ids) == [token(SEED, index).id for index in range(5)]
    assert again.sampling == begun.sampling
    assert (again.prompt, again.on_disconnect) == (begun.prompt, begun.on_disconnect)


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


@pytest.mark.parametrize(
    ("error", "after"),
    [(InvalidRequest.of("sampling.top_p", 2, "(0, 1]"), None), (SlowClient("slow"), 3)],
    ids=["at once", "mid-stream"],
)
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


async def test_a_refusal_is_asked_again_no_sooner_than_the_router_says(complete: Complete) -> None:
    router = Router(refuses(Overloaded("later", retry_after_s=0.2)))
    async with addresses(router) as routers:
        began = time.monotonic()
        assert_whole(await complete(routers))
    assert 0.2 <= time.monotonic() - began < 2.0
    assert router.kinds == "GG"


async def test_absent_routers_are_named(complete: Complete) -> None:
    began = time.monotonic()
    with pytest.raises(WorkersUnavailable, match=r"no router answers at 127.0.0.1:1, 127.0.0.1:2"):
        await complete(["127.0.0.1:1", "127.0.0.1:2"], router_timeout_s=0.3)
    assert time.monotonic() - began < 2.3


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
