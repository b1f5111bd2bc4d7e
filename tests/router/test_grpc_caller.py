"""The public gRPC face, through its real port: clients that leave, read slowly, cancel or come late."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from isthmus.errors import AttachedElsewhere, DeadlinePassed, Draining, IsthmusError, NoFreeBlocks, SlowClient
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.router.fakes import Cluster, ask, no_room, retained
from tests.router.real_ports import ServedRouter, read, real_time_cluster, served_router, until
from tests.router.scripted_decode import SCRIPT

LONG = (SCRIPT * 2)[:60]


@pytest.fixture
async def cluster() -> Cluster:
    made = real_time_cluster()
    made.add_decode().token_interval_s = 0.005
    made.add_prefill()
    return made


@pytest.fixture
async def router(cluster: Cluster) -> AsyncIterator[ServedRouter]:
    async with served_router(cluster) as router:
        yield router
        await router.is_quiet()


def resume(router: ServedRouter, request_id: str, next_index: int) -> grpc.aio.UnaryStreamCall:
    return router.stub.Resume(inference_pb2.ResumeRequest(request_id=request_id, next_index=next_index), timeout=20)


def num_ended(router: ServedRouter, outcome: str) -> float:
    return router.cores.metrics.requests.labels(outcome)._value.get()


async def test_streams_through_the_port(router: ServedRouter) -> None:
    result = await router.generate(ask("Hello", max_tokens=20, seed=7))

    assert (result.tokens, result.text) == (SCRIPT[:20], SCRIPT[:20].decode())
    assert result.start.seed == 7
    assert 0 < result.end.timings.ttft_ms <= result.end.timings.total_ms


async def test_a_client_that_leaves_ends_its_request(router: ServedRouter) -> None:
    call = router.call(ask(max_tokens=4000))
    await read(call, 3)

    call.cancel()

    await until(lambda: router.cores.cluster.decode[0].cancels, "decode was told")
    await router.is_quiet()
    assert num_ended(router, "client_gone") == 1


async def test_a_client_that_leaves_while_its_prompt_is_read_is_counted(router: ServedRouter) -> None:
    """The tokenizer's threads are busy: the call is cancelled before it has become a request."""
    backend = router.server.backend
    assert backend is not None
    gate = asyncio.Event()

    async def waits(prompt: str) -> list[int]:
        await gate.wait()
        return []

    backend.text.encode = waits  # type: ignore[method-assign]
    call = router.call(ask(max_tokens=4))
    await asyncio.wait({asyncio.ensure_future(call.read())}, timeout=0.1)

    call.cancel()

    await until(lambda: num_ended(router, "client_gone") == 1, "counted")


async def test_a_client_that_leaves_can_come_back_for_what_is_kept(router: ServedRouter) -> None:
    call = router.call(retained(max_tokens=60))
    result = await read(call, 5)
    call.cancel()
    await asyncio.sleep(0.05)
    assert router.server.num_streams == 1, "it is kept"

    again = await read(resume(router, result.start.request_id, 5))

    assert again.first_index == 5
    assert result.tokens[:5] + again.tokens == LONG


async def test_a_stream_resumed_elsewhere_says_so_to_its_first_reader(router: ServedRouter) -> None:
    call = router.call(retained(max_tokens=60))
    result = await read(call, 3)

    again = await read(resume(router, result.start.request_id, 0))

    assert again.tokens == LONG
    with pytest.raises(AttachedElsewhere):
        await read(call, result=result)


async def test_a_slow_client_ends_alone_behind_a_window_of_64_kib(cluster: Cluster) -> None:
    def wide_token(request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
        top = [types_pb2.TopLogprob(id=i, logprob=-1.0) for i in range(20)]
        return types_pb2.Token(id=SCRIPT[index % len(SCRIPT)], logprob=-1.0, top_logprobs=top)

    cluster.decode[0].token = wide_token
    cluster.decode[0].token_interval_s = 0.0005
    cluster.prefill[0].token = wide_token
    async with served_router(cluster, max_buffered_tokens=100) as router:
        narrow = grpc.aio.insecure_channel(router.address, options=[("grpc.http2.bdp_probe", 0)])  # 64 KiB window
        slow = inference_pb2_grpc.InferenceServiceStub(narrow).Generate(ask(max_tokens=4000), timeout=20)
        result = await read(slow, 0)

        results = await asyncio.gather(*(router.generate(ask(max_tokens=200)) for _ in range(4)))
        await until(lambda: cluster.decode[0].cancels, "decode was told", timeout_s=10)
        await router.is_quiet()

        assert [result.tokens for result in results] == [(SCRIPT * 5)[:200]] * 4
        with pytest.raises(SlowClient):
            await read(slow, result=result)
        await narrow.close()


async def test_cancel_by_call_ends_the_stream_with_what_it_had(router: ServedRouter) -> None:
    router.cores.cluster.decode[0].max_tokens_sent = 4
    call = router.call(ask(max_tokens=50))
    result = await read(call, 4)

    answer = await router.stub.Cancel(inference_pb2.CancelRequest(request_id=result.start.request_id))
    await read(call, result=result)

    assert answer.found
    assert result.end.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert result.end.usage.num_generated_tokens == 4
    assert not (await router.stub.Cancel(inference_pb2.CancelRequest(request_id=result.start.request_id))).found


async def test_a_deadline_is_told(router: ServedRouter) -> None:
    router.cores.cluster.decode[0].max_tokens_sent = 4

    with pytest.raises(DeadlinePassed):
        await router.generate(ask(max_tokens=50), timeout_s=0.3)
    await router.is_quiet()
    assert 0 < router.cores.cluster.decode[0].reserves[0].request.timeout_ms <= 300


async def test_servers_own_bound_on_time_is_told(cluster: Cluster) -> None:
    cluster.decode[0].max_tokens_sent = 4
    async with served_router(cluster, max_timeout_s=0.3, default_timeout_s=0.3) as router:
        for timeout_s in (None, 20.0):
            with pytest.raises(DeadlinePassed):
                await router.generate(ask(max_tokens=50), timeout_s=timeout_s)
            await router.is_quiet()


async def test_drain_refuses_new_requests_and_waits_for_running_ones(router: ServedRouter) -> None:
    call = router.call(ask(max_tokens=60))
    result = await read(call, 3)

    draining = asyncio.create_task(router.server.drain(5.0))
    await asyncio.sleep(0)
    with pytest.raises(Draining) as refusal:
        await router.generate(ask(max_tokens=3))

    assert refusal.value.retry_after_s
    await read(call, result=result)
    assert await draining == 0
    assert result.tokens == LONG


async def test_drain_says_how_many_are_left_when_its_time_is_over(router: ServedRouter) -> None:
    router.cores.cluster.decode[0].max_tokens_sent = 3
    call = router.call(ask(max_tokens=60))
    await read(call, 3)

    assert await router.server.drain(0.1) == 1
    call.cancel()


async def test_a_draining_router_tells_the_readers_of_kept_streams_to_go_on_elsewhere(cluster: Cluster) -> None:
    async with served_router(cluster) as router, served_router(cluster) as other:
        call = router.call(retained(max_tokens=60))
        result = await read(call, 5)

        assert await router.server.drain(2.0) == 0

        with pytest.raises(Draining):
            await read(call, result=result)
        again = await read(resume(other, result.start.request_id, len(result.tokens)))
        assert result.tokens + again.tokens == LONG
        await other.is_quiet()


async def test_details_of_an_error_are_on_the_wire(cluster: Cluster) -> None:
    cluster.decode[0].refuse = no_room
    async with served_router(cluster, queue_timeout_s=0.2) as router:
        with pytest.raises(NoFreeBlocks) as refusal:
            await router.generate(ask(max_tokens=3))
        assert (refusal.value.grpc_status, refusal.value.reason) == ("RESOURCE_EXHAUSTED", "NO_FREE_BLOCKS")
        assert refusal.value.retry_after_s
        await router.is_quiet()


async def test_a_router_that_is_starting_says_so(router: ServedRouter) -> None:
    backend = router.server.backend
    router.server.backend = None
    with pytest.raises(IsthmusError) as refusal:
        await router.generate(ask(max_tokens=3))
    assert (refusal.value.reason, refusal.value.retry_after_s) == ("WORKERS_UNAVAILABLE", 1.0)
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await router.stub.Cancel(inference_pb2.CancelRequest(request_id="x"))
    assert error_from_rpc(unknown.value).reason == "WORKERS_UNAVAILABLE"
    router.server.backend = backend
