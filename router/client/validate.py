"""What a request may ask, checked once: every refusal names its field, what was given and what is allowed. Pure.

Raw bytes are bounded before protobuf builds objects of them, because parsing holds the event loop. That is also the
only place where two inputs can be told from one: a parsed oneof keeps the last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from isthmus.convert import sampling_from_proto
from isthmus.errors import InvalidRequest, ModelNotFound
from isthmus.process import protobuf_scan
from isthmus.types import SamplingParams
from isthmus.v1 import inference_pb2, types_pb2

MAX_FIELDS = 64  # top-level occurrences; a proper request has at most eleven
MAX_STOP = 16
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 1024
_MAX_SAMPLING_BYTES = 64 << 10
_MAX_ENTRY_BYTES = 4 << 10  # of one entry of `sampling`
# Field numbers of GenerateRequest: the oneof, and what else may be long.
_INPUTS = {3: "prompt", 4: "token_ids", 5: "chat"}
_LONG = {**_INPUTS, 1: "client_request_id", 2: "model", 7: "emitted_token_ids", 11: "tenant"}
_SAMPLING = 6
# What repeats inside of these two: number -> name, most entries. Packed numbers are bounded by bytes instead.
_REPEATED = {
    5: {1: ("chat.messages", MAX_MESSAGES)},
    _SAMPLING: {8: ("sampling.stop", MAX_STOP), 16: ("sampling.logit_bias", MAX_LOGIT_BIAS)},
}
_MAX_NESTED_FIELDS = 4096
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_BIAS = 100.0
MIN_TEMPERATURE = 0.001  # below it logits overflow fp32 long before the result differs from 0
MAX_TEMPERATURE = 100.0
MAX_PENALTY = 2.0
MAX_REPETITION_PENALTY = 10.0
MAX_PRIORITY = 100
MAX_RETENTION_S = 120
DEFAULT_RETENTION_S = 30
MAX_CLIENT_ID_CHARACTERS = 256
MAX_TENANT_CHARACTERS = 64


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The served model, as requests see it."""

    model_id: str
    architecture: str
    digest: str
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]


def parse_request(raw: bytes, max_prompt_bytes: int) -> inference_pb2.GenerateRequest:
    """Bounded before it is parsed. Raises InvalidRequest."""
    check_wire(raw, max_prompt_bytes)
    try:
        return inference_pb2.GenerateRequest.FromString(raw)
    except DecodeError as error:
        allowed = "a serialised isthmus.v1.GenerateRequest, its strings in UTF-8"
        raise InvalidRequest.of("request", "bytes that cannot be read", allowed) from error


def check_wire(raw: bytes, max_prompt_bytes: int) -> None:
    """Raises InvalidRequest naming the field that is too large, given twice, or unreadable; its own work is bounded."""
    inputs: set[int] = set()
    num_bytes: dict[int, int] = {}
    for count, (number, start, end) in enumerate(protobuf_scan.fields(raw, 0, len(raw), "request"), 1):
        if count > MAX_FIELDS:
            raise InvalidRequest.of("request", f"more than {MAX_FIELDS} fields", "each field once")
        inputs |= {number} & _INPUTS.keys()
        num_bytes[number] = num_bytes.get(number, 0) + end - start
        if num_bytes[number] > max_prompt_bytes and number != _SAMPLING:
            given = f"{num_bytes[number]} bytes"
            allowed = f"at most {max_prompt_bytes} bytes"
            raise InvalidRequest.of(_LONG.get(number, "request"), given, allowed)
        if number in _REPEATED:
            _check_wire_entries(raw, start, end, number)
        if number == _SAMPLING and end - start > _MAX_SAMPLING_BYTES:
            raise InvalidRequest.of("sampling", f"{end - start} bytes", f"at most {_MAX_SAMPLING_BYTES} bytes")
    if len(inputs) > 1:
        given = " and ".join(_INPUTS[number] for number in sorted(inputs))
        raise InvalidRequest.of("input", given, "one of prompt, token_ids, chat")


def _check_wire_entries(raw: bytes, start: int, end: int, parent: int) -> None:
    """Counts the entries of what repeats in the message in raw[start:end]."""
    name = "sampling" if parent == _SAMPLING else "chat"
    counts = dict.fromkeys(_REPEATED[parent], 0)
    for seen, (number, first, after) in enumerate(protobuf_scan.fields(raw, start, end, name)):
        if number in counts:
            counts[number] += 1
            field, most = _REPEATED[parent][number]
            if parent == _SAMPLING and after - first > _MAX_ENTRY_BYTES:
                raise InvalidRequest.of(field, f"{after - first} bytes", f"at most {_MAX_ENTRY_BYTES}")
            if counts[number] > most:
                raise InvalidRequest.of(field, f"more than {most} entries", f"at most {most} entries")
        if seen >= _MAX_NESTED_FIELDS:
            raise InvalidRequest.of(name, f"more than {_MAX_NESTED_FIELDS} fields", "each field as often as it may be")


def check_request(message: inference_pb2.GenerateRequest, model: ModelFacts) -> None:
    """Everything that can be said before the prompt is tokenised."""
    check_model(message.model, model)
    _check_continuation(message, model)
    _check_identity(message)
    match message.WhichOneof("input"):
        case "prompt":
            _refuse_unless(bool(message.prompt), "prompt", "", "a prompt that is not empty")
        case "token_ids":
            check_token_ids("token_ids", message.token_ids.ids, model.vocab_size)
        case "chat":
            check_chat(message.chat)
        case _:
            raise InvalidRequest.of("input", None, "one of prompt, token_ids, chat")
    _check_choice(message.sampling)
    _check_penalties(message.sampling)
    _check_ends(message.sampling, model.vocab_size)


def check_resume(message: inference_pb2.ResumeRequest) -> None:
    _check_text("request_id", message.request_id, MAX_CLIENT_ID_CHARACTERS)
    _refuse_unless(bool(message.request_id), "request_id", "", "the id that `accepted` gave")
    _refuse_unless(message.next_index >= 0, "next_index", message.next_index, "0 or more")


def retention_s(message: inference_pb2.GenerateRequest) -> int:
    """How long the stream is kept without a reader; 0: not at all."""
    if message.on_disconnect != types_pb2.ON_DISCONNECT_RETAIN:
        return 0
    return message.retention_s or DEFAULT_RETENTION_S


def check_model(name: str, model: ModelFacts) -> None:
    """By id or by digest; empty is the only model served."""
    if name not in ("", model.model_id, model.digest):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise ModelNotFound(f"model {shown!r} is not served here; served: {model.model_id}")


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int, *, may_be_empty: bool = False) -> None:
    _refuse_unless(may_be_empty or len(token_ids) > 0, field, [], "at least one token id")
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    _refuse_unless(wrong is None, field, wrong, f"ids from 0 to {vocab_size - 1}")


def check_chat(chat: inference_pb2.Chat) -> None:
    """Roles and their order are the chat template's to judge."""
    _refuse_unless(len(chat.messages) > 0, "chat.messages", [], "at least one message")
    empty = next((i for i, message in enumerate(chat.messages) if not message.content), None)
    _refuse_unless(empty is None, f"chat.messages[{empty}].content", "", "content that is not empty")


def complete_sampling(
    params: types_pb2.SamplingParams, num_prompt_tokens: int, model: ModelFacts, *, prompt_field: str = "prompt"
) -> SamplingParams:
    """Defaults filled in, lengths checked against the context; `top_k` beyond the vocabulary is off."""
    room = model.context_length - num_prompt_tokens
    if room < 1:
        allowed = f"at most {model.context_length - 1}: one token of the context of {model.context_length} is generated"
        raise InvalidRequest.of(prompt_field, f"{num_prompt_tokens} tokens", allowed)
    max_tokens = params.max_tokens if params.HasField("max_tokens") else room
    if max_tokens > room:
        allowed = f"at most {room}: the context of {model.context_length} less {num_prompt_tokens} prompt tokens"
        raise InvalidRequest.of("sampling.max_tokens", max_tokens, allowed)
    if params.min_tokens > max_tokens:
        raise InvalidRequest.of("sampling.min_tokens", params.min_tokens, f"at most max_tokens, {max_tokens}")
    top_k = params.top_k if 0 < params.top_k < model.vocab_size else 0
    return replace(sampling_from_proto(params), max_tokens=max_tokens, top_k=top_k)


def _check_continuation(message: inference_pb2.GenerateRequest, model: ModelFacts) -> None:
    """What makes a stream survive: kept for its client, or continued from what the client has."""
    if message.on_disconnect not in types_pb2.OnDisconnect.values():
        raise InvalidRequest.of("on_disconnect", message.on_disconnect, "ABORT or RETAIN")
    check_token_ids("emitted_token_ids", message.emitted_token_ids, model.vocab_size, may_be_empty=True)
    params = message.sampling
    is_greedy = params.HasField("temperature") and params.temperature == 0
    is_whole = params.HasField("seed") or is_greedy or not message.emitted_token_ids
    _refuse_unless(is_whole, "sampling.seed", None, "with emitted_token_ids, the seed they were drawn with")


def _check_identity(message: inference_pb2.GenerateRequest) -> None:
    _check_text("client_request_id", message.client_request_id, MAX_CLIENT_ID_CHARACTERS)
    _check_text("tenant", message.tenant, MAX_TENANT_CHARACTERS)
    _check_range("priority", message.priority, -MAX_PRIORITY, MAX_PRIORITY)
    _check_range("retention_s", message.retention_s, 0, MAX_RETENTION_S)


def _check_choice(params: types_pb2.SamplingParams) -> None:
    """How the next token is chosen."""
    if params.temperature != 0:
        allowed = f"0, or {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
        # fp32 on the wire: the least temperature itself is a little below its decimal value
        is_allowed = MIN_TEMPERATURE * (1 - 1e-6) <= params.temperature <= MAX_TEMPERATURE
        _refuse_unless(is_allowed, "sampling.temperature", params.temperature, allowed)
    if params.HasField("top_p"):
        _refuse_unless(0 < params.top_p <= 1, "sampling.top_p", params.top_p, "above 0, at most 1")
    _refuse_unless(0 <= params.min_p < 1, "sampling.min_p", params.min_p, "0 or more, below 1")
    _refuse_unless(params.top_k >= -1, "sampling.top_k", params.top_k, "-1 or 0 (off), or at least 1")
    if params.HasField("logprobs"):
        _check_range("sampling.logprobs", params.logprobs, 0, MAX_LOGPROBS)


def _check_penalties(params: types_pb2.SamplingParams) -> None:
    _check_range("sampling.presence_penalty", params.presence_penalty, -MAX_PENALTY, MAX_PENALTY)
    _check_range("sampling.frequency_penalty", params.frequency_penalty, -MAX_PENALTY, MAX_PENALTY)
    if params.HasField("repetition_penalty"):
        value = params.repetition_penalty
        is_allowed = 0 < value <= MAX_REPETITION_PENALTY
        allowed = f"above 0, at most {MAX_REPETITION_PENALTY:g}"
        _refuse_unless(is_allowed, "sampling.repetition_penalty", value, allowed)


def _check_ends(params: types_pb2.SamplingParams, vocab_size: int) -> None:
    """Lengths, stops and biases."""
    if params.HasField("max_tokens"):
        _refuse_unless(params.max_tokens >= 1, "sampling.max_tokens", params.max_tokens, "at least 1")
    _refuse_unless(params.min_tokens >= 0, "sampling.min_tokens", params.min_tokens, "0 or more")
    _check_entries("sampling.stop", len(params.stop), MAX_STOP)
    for i, text in enumerate(params.stop):
        is_allowed = 1 <= len(text) <= MAX_STOP_CHARACTERS
        _refuse_unless(is_allowed, f"sampling.stop[{i}]", text, f"1 to {MAX_STOP_CHARACTERS} characters")
    _check_entries("sampling.stop_token_ids", len(params.stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_token_ids("sampling.stop_token_ids", params.stop_token_ids, vocab_size, may_be_empty=True)
    _check_entries("sampling.logit_bias", len(params.logit_bias), MAX_LOGIT_BIAS)
    check_token_ids("sampling.logit_bias", list(params.logit_bias), vocab_size, may_be_empty=True)
    for token_id, bias in params.logit_bias.items():
        _check_range(f"sampling.logit_bias[{token_id}]", bias, -MAX_BIAS, MAX_BIAS)


def _check_text(field: str, text: str, max_characters: int) -> None:
    """Ids are echoed and logged: no line breaks, no control characters."""
    allowed = f"at most {max_characters} printable characters"
    _refuse_unless(len(text) <= max_characters and text.isprintable(), field, text, allowed)


def _check_entries(field: str, num_entries: int, most: int) -> None:
    _refuse_unless(num_entries <= most, field, f"{num_entries} entries", f"at most {most} entries")


def _check_range(field: str, value: float, least: float, most: float) -> None:
    _refuse_unless(math.isfinite(value) and least <= value <= most, field, value, f"{least:g} to {most:g}")


def _refuse_unless(is_allowed: bool, field: str, given: object, allowed: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not is_allowed:
        raise InvalidRequest.of(field, given, allowed)
