"""Every refusal of a bad request, through the router's real port, with its field; other streams are undisturbed."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import InvalidRequest, IsthmusError
from isthmus.process.rpc import channel
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.v1 import inference_pb2, types_pb2
from router.client.grpc_caller import SERVICE
from router.client.validate import MAX_FIELDS, check_request, check_wire, complete_sampling, parse_request
from tests.router.fakes import MODEL, VOCAB_SIZE, ask
from tests.router.real_ports import ServedRouter, real_time_cluster, served_router
from tests.router.scripted_decode import SCRIPT

Message = inference_pb2.GenerateRequest
MIB = 1 << 20


def token_ids(*ids: int, **sampling: Any) -> Message:
    return Message(token_ids=inference_pb2.TokenIds(ids=ids), sampling=types_pb2.SamplingParams(**sampling))


def chat(*messages: tuple[str, str]) -> Message:
    entries = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return Message(chat=inference_pb2.Chat(messages=entries))


BAD: list[tuple[str, Message, str]] = [
    ("empty prompt", ask(""), "prompt"),
    ("no input", Message(), "input"),
    ("no token ids", token_ids(), "token_ids"),
    ("negative id", token_ids(1, -1), "token_ids"),
    ("id beyond the vocabulary", token_ids(VOCAB_SIZE), "token_ids"),
    ("id of 64 bits", token_ids(2**62), "token_ids"),
    ("prompt fills the context", token_ids(*[1] * MODEL.context_length), "token_ids"),
    ("prompt and max_tokens over the context", ask("abc", max_tokens=MODEL.context_length - 2), "sampling.max_tokens"),
    ("10 MB prompt", ask("x" * 10_000_000), "prompt"),
    ("10 MB of ids", token_ids(*[1] * 10_000_000), "token_ids"),
    ("empty chat", chat(), "chat.messages"),
    ("chat without content", chat(("user", "a"), ("assistant", "")), "chat.messages[1].content"),
    ("chat of 50,000 messages", chat(*[("user", "a")] * 50_000), "chat.messages"),
    ("temperature NaN", ask(temperature=math.nan), "sampling.temperature"),
    ("temperature infinite", ask(temperature=math.inf), "sampling.temperature"),
    ("temperature negative", ask(temperature=-1), "sampling.temperature"),
    ("temperature tiny", ask(temperature=1e-30), "sampling.temperature"),
    ("temperature huge", ask(temperature=101), "sampling.temperature"),
    ("top_p zero", ask(top_p=0), "sampling.top_p"),
    ("top_p two", ask(top_p=2), "sampling.top_p"),
    ("top_p NaN", ask(top_p=math.nan), "sampling.top_p"),
    ("top_k -2", ask(top_k=-2), "sampling.top_k"),
    ("min_p one", ask(min_p=1), "sampling.min_p"),
    ("min_p NaN", ask(min_p=math.nan), "sampling.min_p"),
    ("max_tokens zero", ask(max_tokens=0), "sampling.max_tokens"),
    ("max_tokens negative", ask(max_tokens=-5), "sampling.max_tokens"),
    ("max_tokens 2^62", ask(max_tokens=2**62), "sampling.max_tokens"),
    ("min_tokens negative", ask(min_tokens=-1), "sampling.min_tokens"),
    ("min_tokens over max_tokens", ask(max_tokens=3, min_tokens=4), "sampling.min_tokens"),
    ("17 stop strings", ask(stop=["x"] * 17), "sampling.stop"),
    ("10^5 stop strings", ask(stop=["x"] * 100_000), "sampling.stop"),
    ("empty stop string", ask(stop=["a", ""]), "sampling.stop[1]"),
    ("long stop string", ask(stop=["x" * 257]), "sampling.stop[0]"),
    ("1 MB stop string", ask(stop=["x" * MIB]), "sampling.stop"),
    ("65 stop ids", ask(stop_token_ids=[1] * 65), "sampling.stop_token_ids"),
    ("bad stop id", ask(stop_token_ids=[VOCAB_SIZE]), "sampling.stop_token_ids"),
    ("10^6 biases", ask(logit_bias=dict.fromkeys(range(1_000_000), 1.0)), "sampling.logit_bias"),
    ("bias of a bad id", ask(logit_bias={-1: 1.0}), "sampling.logit_bias"),
    ("bias infinite", ask(logit_bias={1: math.inf}), "sampling.logit_bias[1]"),
    ("bias too large", ask(logit_bias={1: -101.0}), "sampling.logit_bias[1]"),
    ("logprobs 10^6", ask(logprobs=1_000_000), "sampling.logprobs"),
    ("logprobs negative", ask(logprobs=-1), "sampling.logprobs"),
    ("presence_penalty NaN", ask(presence_penalty=math.nan), "sampling.presence_penalty"),
    ("frequency_penalty 3", ask(frequency_penalty=3), "sampling.frequency_penalty"),
    ("repetition_penalty zero", ask(repetition_penalty=0), "sampling.repetition_penalty"),
    ("repetition_penalty 11", ask(repetition_penalty=11), "sampling.repetition_penalty"),
    ("line break in the id", Message(prompt="a", client_request_id="a\r\nb"), "client_request_id"),
    ("1 MB id", Message(prompt="a", client_request_id="a" * MIB), "client_request_id"),
    ("long tenant", Message(prompt="a", tenant="a" * 65), "tenant"),
    ("priority", Message(prompt="a", priority=101), "priority"),
    ("retention", Message(prompt="a", retention_s=121), "retention_s"),
    ("unknown enum value", Message(prompt="a", on_disconnect=9), "on_disconnect"),  # type: ignore[arg-type]
]


@pytest.fixture
async def router() -> AsyncIterator[ServedRouter]:
    cluster = real_time_cluster()
    cluster.add_decode()
    cluster.add_prefill()
    async with served_router(cluster) as served:
        yield served
        await served.is_quiet()


async def test_every_bad_field_is_named_and_nobody_else_notices(router: ServedRouter) -> None:
    router.cores.cluster.decode[0].token_interval_s = 0.002
    bystander = asyncio.create_task(router.generate(ask(max_tokens=400)))
    for what, message, field in BAD:
        with pytest.raises(IsthmusError) as refusal:
            await router.generate(message)
        assert isinstance(refusal.value, InvalidRequest), what
        assert [violation.field for violation in refusal.value.violations] == [field], what
        assert "allowed: " in refusal.value.violations[0].description, what
    assert (await bystander).tokens == (SCRIPT * 9)[:400]


async def test_both_inputs_are_seen_in_the_raw_bytes(router: ServedRouter) -> None:
    both = Message(prompt="a").SerializeToString() + token_ids(1, 2).SerializeToString()
    async with channel(router.address) as raw:
        with pytest.raises(InvalidRequest) as refusal:
            await _call_raw(raw, both)
    assert refusal.value.violations[0].field == "input"
    assert "prompt and token_ids" in refusal.value.detail


@pytest.mark.parametrize("raw", [b"\xff" * 40, b"\x1a\x05ab", b"\x1a\x02\xff\xfe", b"\x0b"])
async def test_bytes_that_are_no_message(router: ServedRouter, raw: bytes) -> None:
    async with channel(router.address) as client:
        with pytest.raises(InvalidRequest):
            await _call_raw(client, raw)


async def test_unknown_model(router: ServedRouter) -> None:
    with pytest.raises(IsthmusError) as refusal:
        await router.generate(Message(prompt="a", model="other"))
    assert (refusal.value.grpc_status, refusal.value.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")


@pytest.mark.parametrize("changes", [{"request_id": ""}, {"request_id": "x", "next_index": -1}])
async def test_what_cannot_be_resumed_says_why(router: ServedRouter, changes: dict[str, Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await router.stub.Resume(inference_pb2.ResumeRequest(**changes)).read()
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_nobody_has_is_gone(router: ServedRouter) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await router.stub.Resume(inference_pb2.ResumeRequest(request_id="x")).read()
    assert error_from_rpc(refusal.value).reason == "STREAM_GONE"


async def test_deadline_already_past(router: ServedRouter) -> None:
    with pytest.raises(IsthmusError) as refusal:
        await router.generate(ask(), timeout_s=1e-6)
    assert refusal.value.grpc_status == "DEADLINE_EXCEEDED"


async def test_tokenize_and_back(router: ServedRouter) -> None:
    tokens = await router.stub.Tokenize(inference_pb2.TokenizeRequest(prompt="héllo"))
    text = await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
    models = await router.stub.ListModels(inference_pb2.ListModelsRequest())

    assert text.text == "héllo"
    assert [(model.id, model.vocab_size, model.digest) for model in models.models] == [
        ("tiny", VOCAB_SIZE, MODEL.digest)
    ]
    for bad in (
        router.stub.Tokenize(inference_pb2.TokenizeRequest()),
        router.stub.Tokenize(inference_pb2.TokenizeRequest(prompt="x" * 2 * MIB)),
        router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[-1])),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await bad
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_defaults_are_filled_in() -> None:
    message = parse_request(ask("abc").SerializeToString(), MIB)
    check_request(message, MODEL)
    sampling = complete_sampling(message.sampling, 3, MODEL)

    assert sampling.max_tokens == MODEL.context_length - 3
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (1.0, 1.0, 0, 1.0)
    assert sampling.logprobs is None


@pytest.mark.parametrize(("given_k", "kept"), [(-1, 0), (0, 0), (5, 5), (VOCAB_SIZE, 0), (2**60, 0)])
def test_top_k_beyond_the_vocabulary_is_off(given_k: int, kept: int) -> None:
    assert complete_sampling(types_pb2.SamplingParams(top_k=given_k), 3, MODEL).top_k == kept


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        message = parse_request(raw, MIB)
        check_request(message, MODEL)
    except IsthmusError:
        return
    assert message.WhichOneof("input") is not None


def test_a_message_of_many_fields_is_refused_early() -> None:
    with pytest.raises(InvalidRequest):
        check_wire(b"\x50\x01" * (MAX_FIELDS + 1), MIB)  # priority, again and again


async def _call_raw(client: grpc.aio.Channel, raw: bytes) -> None:
    call = client.unary_stream(f"/{SERVICE}/Generate")(raw, timeout=5)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
