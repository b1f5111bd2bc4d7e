"""The options of a generation, and the message that carries them. The router says which values are allowed."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from isthmus.errors import InvalidRequest
from isthmus.v1 import inference_pb2, types_pb2

RETENTION_S = 15  # how long a stream that lost its reader is kept running: routers restart in less
DEFAULT_TIMEOUT_S = 600.0

Message = Mapping[str, str]  # {"role": "user", "content": "..."}


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` and `complete`. Left out, or None: the default of proto/isthmus/v1/types.proto."""

    token_ids: Sequence[int] | None  # instead of a prompt
    chat: Sequence[Message] | None  # instead of a prompt
    model: str
    client_request_id: str  # echoed, never a key
    tenant: str
    priority: int
    emitted_token_ids: Sequence[int]  # continue after these, with the seed they were made with
    timeout_s: float  # for everything, retries included; 600
    max_tokens: int | None
    min_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None  # the client makes one up
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float | None
    logit_bias: Mapping[int, float]


_IDENTITY = ("model", "client_request_id", "tenant", "priority", "emitted_token_ids")


def request_of(prompt: str | None, options: Mapping[str, Any], *, seed: int) -> inference_pb2.GenerateRequest:
    """The request, resumable and with a seed, so that every repetition gives the same bits.

    `options`: see GenerateOptions; `seed`: for a request that names none. Raises InvalidRequest for a value that the
    message cannot hold, TypeError for an option that does not exist.
    """
    if unknown := options.keys() - GenerateOptions.__annotations__.keys():
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    given = {key: value for key, value in options.items() if value is not None and key != "timeout_s"}
    sources = {"prompt": prompt, "token_ids": given.pop("token_ids", None), "chat": given.pop("chat", None)}
    identity = {name: given.pop(name) for name in _IDENTITY if name in given}
    try:
        return inference_pb2.GenerateRequest(
            **_input(sources),
            **identity,
            sampling=_sampling(given, seed),
            on_disconnect=types_pb2.ON_DISCONNECT_RETAIN,
            retention_s=RETENTION_S,
        )
    except (ValueError, TypeError) as error:  # a value that the message cannot hold
        raise InvalidRequest(str(error)) from error


def chat_of(messages: Sequence[Message]) -> inference_pb2.Chat:
    """The messages as the proto file holds them. Raises ValueError for a key other than `role` and `content`."""
    return inference_pb2.Chat(messages=[inference_pb2.ChatMessage(**message) for message in messages])


def _sampling(given: Mapping[str, Any], seed: int) -> types_pb2.SamplingParams:
    values: dict[str, Any] = {"seed": seed, **given}
    return types_pb2.SamplingParams(**values)


def _input(sources: Mapping[str, Any]) -> dict[str, Any]:
    given = [name for name, value in sources.items() if value is not None]
    match given:
        case ["chat"]:
            return {"chat": chat_of(sources["chat"])}
        case ["token_ids"]:
            return {"token_ids": inference_pb2.TokenIds(ids=sources["token_ids"])}
        case ["prompt"]:
            return {"prompt": sources["prompt"]}
        case _:
            raise InvalidRequest.of("input", given, "one of prompt, token_ids, chat")
