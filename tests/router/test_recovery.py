"""What dies around a request, and what its client sees of it: over scripted workers, through the router's real port."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from isthmus.errors import AttachedElsewhere, Draining, IsthmusError, RequestKillsWorkers
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.v1 import decode_pb2, inference_pb2, types_pb2
from tests.router.fakes import (
    SCRIPT,
    Cluster,
    FakeDecode,
    RunningRouter,
    ask,
    no_room,
    read_to_the_end,
    rest,
    running_router,
    until,
)

LONG = (SCRIPT * 2)[:60]
RETAIN = types_pb2.ON_DISCONNECT_RETAIN


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    for name in ("d0", "d1"):
        await made.add_decode(name)
    await made.add_prefill()
    yield made
    await made.close()


@pytest.fixture
async def router(cluster: Cluster) -> AsyncIterator[RunningRouter]:
    async with running_router(cluster) as running:
        await until(lambda: len(running.pool.usable_decode()) == 2, "both decode workers")
        yield running
        await running.is_quiet()


def retained(**sampling: Any) -> inference_pb2.GenerateRequest:
    request = ask(**sampling)
    request.on_disconnect = RETAIN
    return request


def serving(cluster: Cluster) -> FakeDecode:
    return next(fake for fake in cluster.decode if fake.streams)


async def read_tokens(call: Any, num_tokens: int) -> tuple[str, bytes]:
    """The request id and the first tokens, at least `num_tokens`."""
    request_id, tokens = "", b""
    while len(tokens) < num_tokens:
        response = await call.read()
        request_id = request_id or response.accepted.request_id
        tokens += bytes(token.id for token in response.tokens.tokens)
    return request_id, tokens


async def begin(
    router: RunningRouter, request: inference_pb2.GenerateRequest, num_tokens: int, *, interval_s: float
) -> tuple[Any, str, bytes]:
    """A call that has its first tokens, its request id and these; decode workers take `interval_s` for a token."""
    for fake in router.cluster.decode:
        fake.token_interval_s = interval_s
    call = router.call(request)
    return call, *await read_tokens(call, num_tokens)


async def rest_of(call: Any) -> tuple[bytes, inference_pb2.Finished]:
    responses = [response async for response in rest(call)]
    return bytes(token.id for r in responses for token in r.tokens.tokens), responses[-1].finished


def resume(router: RunningRouter, request_id: str, next_index: int) -> Any:
    request = inference_pb2.ResumeRequest(request_id=request_id, next_index=next_index)
    return router.stub.Resume(request, timeout=20)


async def resumed(call: Any) -> tuple[bytes, inference_pb2.Finished]:
    responses = [response async for response in call]
    return bytes(token.id for r in responses for token in r.tokens.tokens), responses[-1].finished


async def test_a_lost_decode_worker_is_replaced_at_the_next_token(router: RunningRouter) -> None:
    call, _, tokens = await begin(router, ask(max_tokens=60), 5, interval_s=0.01)
    lost = serving(router.cluster)
    await router.cluster.kill(lost)

    more, finished = await rest_of(call)

    assert tokens + more == LONG
    assert finished.num_attempts == 2
    (spare,) = (fake for fake in router.cluster.decode if fake is not lost)
    emitted = spare.reserves[-1].request.emitted_token_ids
    assert bytes(emitted) == LONG[: len(emitted)]
    assert len(emitted) >= 5


async def test_a_connection_that_blips_goes_on_where_it_was(router: RunningRouter) -> None:
    for fake in router.cluster.decode:
        fake.token_interval_s, fake.keeps_streams = 0.01, True
    call = router.call(ask(max_tokens=60))
    _, tokens = await read_tokens(call, 5)
    fake = serving(router.cluster)

    fake.lose_sessions.set()
    await asyncio.sleep(0)
    fake.lose_sessions = asyncio.Event()

    more, finished = await rest_of(call)
    assert tokens + more == LONG
    assert finished.num_attempts == 1
    assert len(fake.hellos[-1].streams) == 1
    assert len(fake.reserves) == 1


async def test_a_request_that_kills_two_decode_workers_ends(router: RunningRouter) -> None:
    def kills(request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
        if index == 7:
            serving(router.cluster).lose_sessions.set()
            raise asyncio.CancelledError
        return types_pb2.Token(id=SCRIPT[index])

    for fake in router.cluster.decode:
        fake.token, fake.token_interval_s = kills, 0.01

    with pytest.raises(RequestKillsWorkers, match="2 decode workers"):
        await router.generate(ask(max_tokens=20))


async def test_a_leaving_decode_worker_hands_its_stream_to_another(router: RunningRouter) -> None:
    call, _, tokens = await begin(router, ask(max_tokens=60), 5, interval_s=0.01)
    first = serving(router.cluster)

    first.leave()
    more, finished = await rest_of(call)

    (other,) = (fake for fake in router.cluster.decode if fake is not first)
    assert tokens + more == LONG
    assert finished.num_attempts == 1
    assert finished.workers.decode == other.name
    assert other.reserves[-1].moves
    assert len(router.cluster.prefill[0].requests) == 1, "nothing is computed again"


async def test_a_reservation_that_is_answered_too_late_is_not_taken_for_the_next(router: RunningRouter) -> None:
    call, _, tokens = await begin(router, ask(max_tokens=60), 5, interval_s=0.03)
    first = serving(router.cluster)
    (other,) = (fake for fake in router.cluster.decode if fake is not first)
    other.answer_delays_s = iter([0.35, 0.2])

    first.leave()
    more, _ = await rest_of(call)

    assert tokens + more == LONG
    moved = [event for event in router.cluster.ledger.read() if event.event == "request.moved"]
    assert [event.transfer_id for event in moved] == [first.moves[-1].target.transfer_id]
    assert first.moves[-1].target.counter == other.reserves[-1].attach.counter
    assert [reserve.attach.counter for reserve in other.reserves] == [2, 3], "the first one's end is not the second's"


async def test_a_stream_does_not_leave_because_another_worker_does(router: RunningRouter) -> None:
    def leaves(reserve: decode_pb2.Reserve) -> IsthmusError:
        return Draining("leaving")

    first = router.cluster.decode[0]
    first.refuse, first.is_leaving = leaves, True
    for fake in router.cluster.decode:
        fake.token_interval_s = 0.02

    results = await asyncio.gather(*(router.generate(ask(max_tokens=60)) for _ in range(4)))

    assert [bytes(result.token_ids) for result in results] == [LONG] * 4
    assert first.reserves, "it was asked first"
    assert not any(event.event == "request.moved" for event in router.cluster.ledger.read())


async def test_a_stream_resumed_at_a_worker_that_leaves_moves(router: RunningRouter) -> None:
    _call, request_id, _ = await begin(router, retained(max_tokens=60), 3, interval_s=0.03)
    first = serving(router.cluster)
    (other,) = (fake for fake in router.cluster.decode if fake is not first)
    other.refuse = no_room
    first.leave()
    await until(lambda: any(reserve.moves for reserve in other.reserves), "asked, and refused")
    other.refuse = lambda reserve: None

    tokens, finished = await resumed(resume(router, request_id, 0))

    assert tokens == LONG
    assert finished.workers.decode == other.name


async def test_a_stream_attached_before_it_was_filled_is_placed_anew(router: RunningRouter) -> None:
    router.cluster.prefill[0].commits = False
    call = router.call(retained(max_tokens=60))
    request_id, _ = await read_tokens(call, 1)
    router.cluster.prefill[0].commits = True

    tokens, finished = await resumed(resume(router, request_id, 0))

    assert tokens == LONG
    assert finished.num_attempts == 2
    with pytest.raises(AttachedElsewhere):
        await read_to_the_end(call)


async def test_nowhere_to_go_the_stream_stays(router: RunningRouter) -> None:
    call, _, tokens = await begin(router, ask(max_tokens=60), 5, interval_s=0.01)
    first = serving(router.cluster)
    (other,) = (fake for fake in router.cluster.decode if fake is not first)
    other.refuse = lambda reserve: IsthmusError("no")

    first.leave()

    assert tokens + (await rest_of(call))[0] == LONG


async def test_resumed_at_any_router_from_any_index(router: RunningRouter, cluster: Cluster) -> None:
    call, request_id, _ = await begin(router, retained(max_tokens=60), 5, interval_s=0.02)

    async with running_router(cluster) as other:
        tokens_there, finished = await resumed(resume(other, request_id, 3))

    assert tokens_there == LONG[3:]
    assert finished.usage.num_generated_tokens == 60
    with pytest.raises(AttachedElsewhere):
        await read_to_the_end(call)


async def test_resumed_at_the_router_that_has_it(router: RunningRouter) -> None:
    call, request_id, _ = await begin(router, retained(max_tokens=60), 5, interval_s=0.02)

    tokens_again, _ = await resumed(resume(router, request_id, 0))

    assert tokens_again == LONG
    with pytest.raises(AttachedElsewhere):
        await read_to_the_end(call)


async def test_a_kept_stream_outlives_its_client_and_its_decode_worker(router: RunningRouter) -> None:
    call, request_id, _ = await begin(router, retained(max_tokens=60), 5, interval_s=0.03)
    call.cancel()
    lost = serving(router.cluster)
    await router.cluster.kill(lost)
    (spare,) = (fake for fake in router.cluster.decode if fake is not lost)
    await until(lambda: request_id in spare.streams and spare.streams[request_id].num_sent > 8, "running again")

    tokens, _ = await resumed(resume(router, request_id, 5))

    assert tokens == LONG[5:]


async def test_a_stream_that_is_not_kept_ends_with_its_client(router: RunningRouter) -> None:
    call, request_id, _ = await begin(router, ask(max_tokens=60), 3, interval_s=0.02)
    call.cancel()
    await router.is_quiet()

    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await resume(router, request_id, 0).read()
    assert error_from_rpc(refusal.value).reason == "STREAM_GONE"


async def test_cancel_reaches_a_stream_of_another_router(router: RunningRouter, cluster: Cluster) -> None:
    call, request_id, _ = await begin(router, retained(max_tokens=60), 3, interval_s=0.02)

    async with running_router(cluster) as other:
        answer = await other.stub.Cancel(inference_pb2.CancelRequest(request_id=request_id))

    assert answer.found
    with pytest.raises(AttachedElsewhere):
        await read_to_the_end(call)
    await until(lambda: not any(fake.streams for fake in cluster.decode), "nothing runs")


@pytest.mark.parametrize("num_emitted", [1, 7, 59])
async def test_continued_from_its_tokens(router: RunningRouter, num_emitted: int) -> None:
    request = ask(max_tokens=60, seed=3)
    request.emitted_token_ids.extend(LONG[:num_emitted])

    call = router.call(request)
    responses = [response async for response in rest(call)]

    first = next(response.tokens for response in responses if response.HasField("tokens"))
    assert first.index == num_emitted
    assert bytes(token.id for r in responses for token in r.tokens.tokens) == LONG[num_emitted:]
    assert "".join(r.tokens.text + r.finished.text for r in responses) == LONG[num_emitted:].decode()


async def test_continued_from_all_its_tokens_only_the_end_was_missing(router: RunningRouter) -> None:
    request = ask(max_tokens=60, seed=3)
    request.emitted_token_ids.extend(LONG)

    responses = [response async for response in rest(router.call(request))]

    assert [response.WhichOneof("event") for response in responses] == ["accepted", "finished"]
    assert responses[-1].finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert not router.cluster.prefill[0].requests


@pytest.mark.parametrize(
    ("emitted", "sampling", "field"),
    [
        (LONG, {"max_tokens": 59, "seed": 1}, "emitted_token_ids"),
        (LONG[:3], {"max_tokens": 10, "stop": ["h"], "seed": 1}, "emitted_token_ids"),
        ([-1], {"max_tokens": 10, "seed": 1}, "emitted_token_ids"),
        (LONG[:3], {"max_tokens": 10}, "sampling.seed"),
    ],
)
async def test_emitted_tokens_that_cannot_be(
    router: RunningRouter, emitted: Any, sampling: dict[str, Any], field: str
) -> None:
    request = ask(**sampling)
    request.emitted_token_ids.extend(emitted)
    with pytest.raises(IsthmusError) as refusal:
        await router.generate(request)
    assert refusal.value.grpc_status == "INVALID_ARGUMENT"
    assert refusal.value.violations[0].field == field


async def test_a_draining_router_hands_kept_streams_on(router: RunningRouter, cluster: Cluster) -> None:
    for fake in cluster.decode:
        fake.token_interval_s, fake.keeps_streams = 0.02, True
    call = router.call(retained(max_tokens=60))
    request_id, tokens = await read_tokens(call, 5)

    assert await router.server.drain(2.0) == 0

    with pytest.raises(IsthmusError) as told:
        await read_to_the_end(call)
    assert told.value.reason == "DRAINING"
    async with running_router(cluster) as other:
        more, _ = await resumed(resume(other, request_id, 5))
    assert (tokens[:5] + more) == LONG
