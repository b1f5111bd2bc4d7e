"""Protobuf messages to the dataclasses of isthmus.types and back; the public request is read by router/validate.py."""

from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

from isthmus.kv.layout import KvLayout
from isthmus.types import BlockCounts, Extent, FinishReason, Request, SamplingParams, Token, TransferTarget
from isthmus.v1 import admin_pb2, decode_pb2, prefill_pb2, types_pb2

_FINISH_REASONS = {reason: getattr(types_pb2, f"FINISH_REASON_{reason.name}") for reason in FinishReason}


def finish_reason_to_proto(reason: FinishReason) -> types_pb2.FinishReason:
    return _FINISH_REASONS[reason]


def finish_reason_from_proto(value: int) -> FinishReason | None:
    """None for UNSPECIFIED: the sequence goes on."""
    return next((reason for reason, number in _FINISH_REASONS.items() if number == value), None)


def sampling_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    values = asdict(params)
    values["logit_bias"] = dict(params.logit_bias)
    return types_pb2.SamplingParams(**values)


def sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    """Unset fields take their defaults; `max_tokens`, always set between services, is then 0. The seed is not in it."""
    values: dict[str, Any] = {field.name: value for field, value in message.ListFields() if field.name != "seed"}
    values["max_tokens"] = message.max_tokens
    values["stop"] = tuple(message.stop)
    values["stop_token_ids"] = tuple(message.stop_token_ids)
    values["logit_bias"] = tuple(sorted(message.logit_bias.items()))
    return SamplingParams(**values)


def request_to_proto(request: Request) -> types_pb2.EngineRequest:
    values = {field.name: getattr(request, field.name) for field in fields(request)}  # `asdict` would copy the prompt
    values["sampling"] = sampling_to_proto(request.sampling)
    timeout_s: float | None = values.pop("timeout_s")
    return types_pb2.EngineRequest(**values, timeout_ms=0 if timeout_s is None else max(1, int(timeout_s * 1000)))


def request_from_proto(message: types_pb2.EngineRequest) -> Request:
    values: dict[str, Any] = {f.name: getattr(message, f.name) for f in fields(Request) if f.name != "timeout_s"}
    for name in ("prompt_token_ids", "eos_token_ids", "emitted_token_ids"):
        values[name] = tuple(values[name])
    values["sampling"] = sampling_from_proto(message.sampling)
    values["timeout_s"] = message.timeout_ms / 1000 if message.timeout_ms else None
    return Request(**values)


def token_to_proto(token: Token) -> types_pb2.Token:
    top = [types_pb2.TopLogprob(id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs]
    return types_pb2.Token(id=token.id, logprob=token.logprob, top_logprobs=top)


def token_from_proto(message: types_pb2.Token) -> Token:
    top = tuple((entry.id, entry.logprob) for entry in message.top_logprobs)
    return Token(message.id, message.logprob if message.HasField("logprob") else None, top)


def extent_to_proto(extent: Extent, layout: KvLayout) -> types_pb2.Extent:
    return types_pb2.Extent(**{**asdict(extent), "plane": layout.number_of(extent.plane)})


def extents_from_proto(messages: Iterable[types_pb2.Extent], layout: KvLayout) -> tuple[Extent, ...]:
    """Without those of planes that `layout` does not have: a peer of the same fingerprint means advisory ones."""
    known = range(len(layout.planes))
    return tuple(
        Extent(layout.name_of(message.plane), message.layer, message.first_token, message.num_tokens)
        for message in messages
        if message.plane in known
    )


def target_from_proto(message: prefill_pb2.TransferTarget | decode_pb2.Reserved, layout: KvLayout) -> TransferTarget:
    """`layout` is this process's, which the message's fingerprint need not be; whoever opens a transfer compares."""
    is_reserved = isinstance(message, decode_pb2.Reserved)
    return TransferTarget(
        transfer_id=message.transfer_id,
        attempt=message.attempt,
        zmq_endpoint=message.zmq_endpoint,
        receiver_incarnation=message.incarnation if is_reserved else message.receiver_incarnation,
        layout_fingerprint=message.layout_fingerprint,
        missing=extents_from_proto(message.missing, layout),
    )


def layout_to_proto(layout: KvLayout) -> types_pb2.KvLayout:
    values = asdict(layout)
    for plane in values["planes"]:
        del plane["advisory"]
        plane["kind"] = types_pb2.PlaneKind.Value(f"PLANE_KIND_{plane['kind'].name}")
    return types_pb2.KvLayout(**values, fingerprint=layout.fingerprint)


def block_counts_to_proto(counts: BlockCounts) -> admin_pb2.BlockCounts:
    return admin_pb2.BlockCounts(**asdict(counts))
