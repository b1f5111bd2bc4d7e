"""A request's life through the router's real port, over scripted workers."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from isthmus.errors import (
    IsthmusError,
    NoFreeBlocks,
    NonFiniteLogits,
    Overloaded,
    RequestKillsWorkers,
    TransferIncomplete,
    WorkerLost,
)
from isthmus.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from router.losses import MAX_FRUITLESS
from tests.router.fakes import (
    EOS,
    SCRIPT,
    Cluster,
    FakeDecode,
    FakePrefill,
    RunningRouter,
    ask,
    read_to_the_end,
    rest,
    running_router,
    until,
)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    await made.add_decode()
    await made.add_prefill()
    yield made
    await made.close()


@pytest.fixture
async def router(cluster: Cluster) -> AsyncIterator[RunningRouter]:
    async with running_router(cluster) as running:
        yield running
        await running.is_quiet()


async def test_streams_every_token_once_and_accounts_for_it(router: RunningRouter) -> None:
    result = await router.generate(ask("Hello", max_tokens=20, seed=7))

    assert bytes(result.token_ids) == SCRIPT[:20]
    assert result.text == SCRIPT[:20].decode()
    assert result.start.seed == 7
    finished = result.end
    assert finished.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert (finished.usage.num_prompt_tokens, finished.usage.num_generated_tokens) == (5, 20)
    assert finished.usage.num_cached_tokens == 5
    assert (finished.workers.prefill, finished.workers.decode, finished.num_attempts) == ("p0", "d0", 1)
    assert (finished.timings.transfer_bytes, finished.timings.prefill_ms) == (4096, 3.0)
    assert 0 < finished.timings.ttft_ms <= finished.timings.total_ms
    assert not router.cluster.decode[0].cancels


async def test_token_zero_reaches_the_client_before_decode_has_anything(router: RunningRouter) -> None:
    router.cluster.prefill[0].commits = False
    call = router.call(ask(max_tokens=5))

    events = [(await call.read()).WhichOneof("event") for _ in range(2)]

    assert events == ["accepted", "tokens"]
    call.cancel()


async def test_max_tokens_one_needs_no_decode(router: RunningRouter) -> None:
    result = await router.generate(ask(max_tokens=1))

    assert bytes(result.token_ids) == SCRIPT[:1]
    assert result.end.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert result.end.workers.decode == ""
    assert not router.cluster.decode[0].cancels


async def test_eos_at_token_zero_ends_the_request(router: RunningRouter) -> None:
    router.cluster.prefill[0].token = lambda request, index: types_pb2.Token(id=EOS)

    result = await router.generate(ask(max_tokens=9))

    assert (result.token_ids, result.text) == ([EOS], "")
    assert result.end.finish_reason == types_pb2.FINISH_REASON_STOP


async def test_eos_later_is_counted_but_is_no_text(router: RunningRouter) -> None:
    def token(request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
        return types_pb2.Token(id=EOS if index == 3 else SCRIPT[index])

    router.cluster.decode[0].token = router.cluster.prefill[0].token = token

    result = await router.generate(ask(max_tokens=9))

    assert (result.text, result.token_ids[-1]) == ("The", EOS)
    assert result.end.usage.num_generated_tokens == 4


@pytest.mark.parametrize(("include_stop", "text"), [(False, "The quick "), (True, "The quick brown")])
async def test_stop_string_across_tokens_ends_the_request(router: RunningRouter, include_stop: bool, text: str) -> None:
    router.cluster.decode[0].token_interval_s = 0.001

    result = await router.generate(ask(max_tokens=500, stop=["dog", "brown"], include_stop=include_stop))

    assert result.text == text
    assert bytes(result.token_ids) == b"The quick brown"
    assert result.end.finish_reason == types_pb2.FINISH_REASON_STOP
    await until(lambda: len(router.cluster.decode[0].cancels) == 1, "decode was told")
    assert router.cluster.decode[0].cancels[0].finish_reason == types_pb2.FINISH_REASON_STOP


async def test_stop_string_inside_a_step_of_many_tokens(router: RunningRouter) -> None:
    router.cluster.decode[0].tokens_per_step = 32

    result = await router.generate(ask(max_tokens=64, stop=["quick"]))

    assert (result.text, bytes(result.token_ids)) == ("The ", b"The quick")


async def test_text_does_not_depend_on_grouping(cluster: Cluster) -> None:
    texts: set[str] = set()
    async with running_router(cluster) as router:
        for tokens_per_step in (1, 2, 7, 100):
            cluster.decode[0].tokens_per_step = tokens_per_step
            texts.add((await router.generate(ask(max_tokens=77, stop=["dogs"]))).text)
    assert len(texts) == 1


@pytest.mark.parametrize("phase", ["reserving", "prefilling", "filling", "decoding"])
async def test_client_gone_in_any_phase_frees_everything(router: RunningRouter, phase: str) -> None:
    decode, prefill = router.cluster.decode[0], router.cluster.prefill[0]
    if phase == "reserving":
        decode.answers_reserve = False
    elif phase == "prefilling":
        prefill.hold_first_token = asyncio.Event()
    elif phase == "filling":
        prefill.commits = False
    else:
        decode.max_tokens_sent = 4
    call = router.call(ask(max_tokens=50))
    await call.read()
    await until(lambda: len(decode.reserves) == 1, "reserved")
    if phase != "reserving":
        await until(lambda: len(prefill.requests) == 1, "prefilling")
    if phase == "decoding":
        while (await call.read()).tokens.index < 2:
            pass

    call.cancel()

    await until(lambda: len(decode.cancels) == 1, "decode was told")
    assert decode.cancels[0].attach.counter == 1
    await router.is_quiet()
    if phase == "prefilling":
        assert prefill.num_cancelled == 1
    decode.answers_reserve, decode.max_tokens_sent, prefill.commits, prefill.hold_first_token = True, None, True, None
    assert (await router.generate(ask(max_tokens=3))).text == "The"


async def test_cancel_call_ends_the_stream_with_what_it_had(router: RunningRouter) -> None:
    router.cluster.decode[0].max_tokens_sent = 4
    call = router.call(ask(max_tokens=50))
    accepted = (await call.read()).accepted
    while (await call.read()).tokens.index < 3:
        pass

    answer = await router.stub.Cancel(inference_pb2.CancelRequest(request_id=accepted.request_id))
    last = (await call.read()).finished

    assert answer.found
    assert last.finish_reason == types_pb2.FINISH_REASON_CANCELLED
    assert last.usage.num_generated_tokens == 4
    await until(lambda: len(router.cluster.decode[0].cancels) == 1, "decode was told")
    assert not (await router.stub.Cancel(inference_pb2.CancelRequest(request_id=accepted.request_id))).found


@pytest.mark.parametrize("phase", ["prefilling", "decoding"])
async def test_deadline_frees_everything(router: RunningRouter, phase: str) -> None:
    decode, prefill = router.cluster.decode[0], router.cluster.prefill[0]
    if phase == "prefilling":
        prefill.hold_first_token = asyncio.Event()
    decode.max_tokens_sent = 4

    with pytest.raises(IsthmusError) as refusal:
        await router.generate(ask(max_tokens=50), timeout_s=0.4)

    assert refusal.value.reason == "DEADLINE_PASSED"
    await router.is_quiet()
    assert 0 < decode.reserves[0].request.timeout_ms <= 400


async def test_servers_own_bound_on_time_is_told(cluster: Cluster) -> None:
    cluster.decode[0].max_tokens_sent = 4
    async with running_router(cluster, max_timeout_s=0.3, default_timeout_s=0.3) as router:
        with pytest.raises(IsthmusError) as refusal:
            await router.generate(ask(max_tokens=50), timeout_s=None)
        assert refusal.value.reason == "DEADLINE_PASSED"
        await router.is_quiet()


async def test_prefill_lost_before_its_token_is_repeated_elsewhere(router: RunningRouter) -> None:
    spare = await router.cluster.add_prefill("p1")
    await until(lambda: len(router.pool.usable_prefill()) == 2, "both prefill workers")
    for fake in router.cluster.prefill:
        fake.fail = lambda call: WorkerLost("crashed") if _total_calls(router) == 1 else None

    result = await router.generate(ask(max_tokens=6))

    assert bytes(result.token_ids) == SCRIPT[:6]
    assert result.end.num_attempts == 2
    assert [rearm.attempt for rearm in router.cluster.decode[0].rearms] == [2]
    first, second = sorted((router.cluster.prefill[0].requests[0], spare.requests[0]), key=lambda r: r.target.attempt)
    assert (first.target.attempt, second.target.attempt) == (1, 2)
    assert second.target.missing[0].layer == 1, "what is missing now, in the decode worker's words"


async def test_a_request_that_kills_two_prefill_workers_ends(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.drive.SUSPECT_S", 0.05)
    router.cluster.prefill[0].crash = lambda call: WorkerLost("crashed")

    with pytest.raises(RequestKillsWorkers, match="2 prefill workers"):
        await router.generate(ask(max_tokens=6))

    assert len(router.cluster.prefill[0].requests) == 2
    await router.is_quiet()


async def test_error_of_the_request_itself_is_not_repeated(router: RunningRouter) -> None:
    router.cluster.prefill[0].fail = lambda call: NonFiniteLogits("NaN")

    with pytest.raises(NonFiniteLogits):
        await router.generate(ask(max_tokens=6))

    assert len(router.cluster.prefill[0].requests) == 1


async def test_failed_transfer_is_repeated_and_token_zero_is_not(router: RunningRouter) -> None:
    prefill, decode = router.cluster.prefill[0], router.cluster.decode[0]
    prefill.commits = False
    call = router.call(ask(max_tokens=6))
    received = [await call.read(), await call.read()]
    prefill.commits = True

    decode.abort(prefill.requests[0].target.transfer_id, is_finished=False)
    async for response in rest(call):
        received.append(response)

    tokens = [token.id for response in received for token in response.tokens.tokens]
    assert bytes(tokens) == SCRIPT[:6]
    assert received[-1].finished.num_attempts == 2


async def test_a_transfer_that_never_succeeds_ends_the_request(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.drive.SUSPECT_S", 0.05)
    prefill = router.cluster.prefill[0]
    prefill.commits, prefill.done.acked, prefill.done.failure = False, False, "no ack"

    with pytest.raises(TransferIncomplete):
        await router.generate(ask(max_tokens=6))

    assert len(prefill.requests) == MAX_FRUITLESS


async def test_decode_lost_before_its_tokens_is_repeated_elsewhere(router: RunningRouter) -> None:
    router.cluster.prefill[0].commits = False
    call = router.call(ask(max_tokens=6))
    received = [await call.read(), await call.read()]
    spare = await router.cluster.add_decode("d1")
    await until(lambda: len(router.pool.usable_decode()) == 2, "both decode workers")
    router.cluster.prefill[0].commits = True

    router.cluster.decode[0].lose_sessions.set()
    async for response in rest(call):
        received.append(response)

    assert bytes(token.id for response in received for token in response.tokens.tokens) == SCRIPT[:6]
    assert received[-1].finished.workers.decode == spare.name


async def test_session_comes_back_after_a_loss(router: RunningRouter) -> None:
    decode = router.cluster.decode[0]
    decode.lose_sessions.set()
    await until(lambda: not router.pool.usable_decode(), "lost")
    decode.lose_sessions.clear()

    await until(lambda: len(router.pool.usable_decode()) == 1, "back")
    assert (await router.generate(ask(max_tokens=3))).text == "The"


async def test_differing_copies_are_data_loss(router: RunningRouter) -> None:
    router.cluster.decode[0].token = lambda request, index: types_pb2.Token(id=SCRIPT[index] ^ 1)

    with pytest.raises(IsthmusError) as refusal:
        await router.generate(ask(max_tokens=6))

    assert refusal.value.grpc_status == "DATA_LOSS"


async def test_slow_client_ends_alone(cluster: Cluster) -> None:
    def wide_token(request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
        top = [types_pb2.TopLogprob(id=i, logprob=-1.0) for i in range(20)]
        return types_pb2.Token(id=SCRIPT[index % len(SCRIPT)], logprob=-1.0, top_logprobs=top)

    cluster.decode[0].token = cluster.prefill[0].token = wide_token
    async with running_router(cluster, max_buffered_tokens=100) as router:
        narrow = grpc.aio.insecure_channel(router.address, options=[("grpc.http2.bdp_probe", 0)])  # 64 KiB window
        slow = inference_pb2_grpc.InferenceServiceStub(narrow).Generate(ask(max_tokens=4000), timeout=20)
        await slow.read()
        others = [router.generate(ask(max_tokens=200)) for _ in range(4)]

        results = await asyncio.gather(*others)
        await until(lambda: len(cluster.decode[0].cancels) == 1, "decode was told", timeout_s=10)
        await router.is_quiet()

        assert all(bytes(result.token_ids) == (SCRIPT * 5)[:200] for result in results)
        with pytest.raises(IsthmusError) as refusal:
            await read_to_the_end(slow)
        assert refusal.value.reason == "SLOW_CLIENT"
        await narrow.close()


async def test_full_decode_workers_are_asked_in_turn(router: RunningRouter) -> None:
    spare = await router.cluster.add_decode("d1")
    await until(lambda: len(router.pool.usable_decode()) == 2, "both decode workers")
    for fake in router.cluster.decode:
        fake.refuse = lambda reserve: NoFreeBlocks("full") if len(_reserves(router)) == 1 else None

    result = await router.generate(ask(max_tokens=3))

    assert result.text == "The"
    assert len(_reserves(router)) == 2
    assert result.end.num_attempts == 1
    assert spare.streams == {}


async def test_waits_for_room_in_order(router: RunningRouter) -> None:
    decode = router.cluster.decode[0]
    decode.refuse = lambda reserve: NoFreeBlocks("full")
    calls = [asyncio.create_task(router.generate(ask(f"number {i}", max_tokens=3))) for i in range(3)]
    await until(lambda: len(decode.reserves) >= 4, "refused")

    decode.refuse = lambda reserve: None
    results = await asyncio.gather(*calls)

    assert all(result.text == "The" for result in results)


async def test_full_for_too_long_is_an_error_with_retry_info(cluster: Cluster) -> None:
    cluster.decode[0].refuse = lambda reserve: NoFreeBlocks("full")
    async with running_router(cluster, queue_timeout_s=0.4) as router:
        with pytest.raises(NoFreeBlocks) as refusal:
            await router.generate(ask(max_tokens=3))
        assert refusal.value.retry_after_s
        await router.is_quiet()


async def test_queue_over_its_bound_is_refused_at_once(cluster: Cluster) -> None:
    cluster.prefill[0].hold_first_token = asyncio.Event()
    async with running_router(cluster, max_streams=2, max_queue=3) as router:
        calls = [asyncio.create_task(router.generate(ask(max_tokens=3))) for _ in range(5)]
        await until(lambda: router.admission.num_queued == 3, "queued")

        with pytest.raises(Overloaded) as refusal:
            await router.generate(ask(max_tokens=3))

        assert refusal.value.retry_after_s
        cluster.prefill[0].hold_first_token.set()
        assert {result.text for result in await asyncio.gather(*calls)} == {"The"}
        await router.is_quiet()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_no_worker_of_a_role_is_unavailable_after_a_bounded_wait(cluster: Cluster, role: str) -> None:
    async with running_router(cluster, queue_timeout_s=0.5) as router:
        fake: FakeDecode | FakePrefill = cluster.prefill[0] if role == "prefill" else cluster.decode[0]
        await cluster.kill(fake)
        await until(lambda: not (router.pool.prefill if role == "prefill" else router.pool.decode), "gone")

        with pytest.raises(IsthmusError) as refusal:
            await router.generate(ask(max_tokens=3))

        assert refusal.value.reason == "WORKERS_UNAVAILABLE"
        assert refusal.value.retry_after_s
        await router.is_quiet()


async def test_drain_refuses_new_requests_and_waits_for_running_ones(router: RunningRouter) -> None:
    router.cluster.decode[0].token_interval_s = 0.01
    running = asyncio.create_task(router.generate(ask(max_tokens=30)))
    await until(lambda: router.server.num_streams == 1, "running")

    draining = asyncio.create_task(router.server.drain(5.0))
    await asyncio.sleep(0)
    with pytest.raises(IsthmusError) as refusal:
        await router.generate(ask(max_tokens=3))

    assert refusal.value.reason == "DRAINING"
    assert await draining == 0
    assert len((await running).token_ids) == 30


async def test_many_at_once_with_cancels_leave_nothing(router: RunningRouter) -> None:
    async def one(i: int) -> None:
        call = router.call(ask(f"prompt {i}", max_tokens=20))
        num_read = 0
        async for _ in call:
            num_read += 1
            if i % 3 == 0 and num_read > i % 7:
                call.cancel()
                return

    router.cluster.decode[0].token_interval_s = 0.001
    results = await asyncio.gather(*(one(i) for i in range(60)), return_exceptions=True)

    unexpected = [r for r in results if not (r is None or isinstance(r, asyncio.CancelledError))]
    assert unexpected == []
    await router.is_quiet()


def _total_calls(router: RunningRouter) -> int:
    return sum(len(fake.requests) for fake in router.cluster.prefill)


def _reserves(router: RunningRouter) -> list[object]:
    return [reserve for fake in router.cluster.decode for reserve in fake.reserves]
