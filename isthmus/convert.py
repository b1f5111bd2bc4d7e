"""Protobuf messages to the dataclasses of isthmus.types and back; the public request is read by router/validate.py."""

from isthmus.kv_layout import KvLayout, Plane, PlaneKind
from isthmus.types import (
    BlockCounts,
    Extent,
    FinishReason,
    OnDisconnect,
    Request,
    SamplingParams,
    Token,
    TransferTarget,
)
from isthmus.v1 import admin_pb2, prefill_pb2, types_pb2

_PLANE_KINDS = {
    PlaneKind.APPEND_ONLY: types_pb2.PLANE_KIND_APPEND_ONLY,
    PlaneKind.WINDOWED: types_pb2.PLANE_KIND_WINDOWED,
    PlaneKind.MUTABLE: types_pb2.PLANE_KIND_MUTABLE,
}
_FINISH_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: types_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: types_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: types_pb2.FINISH_REASON_ERROR,
}


def finish_reason_to_proto(reason: FinishReason) -> types_pb2.FinishReason:
    return _FINISH_REASONS[reason]


def finish_reason_from_proto(value: int) -> FinishReason | None:
    """None for UNSPECIFIED: the sequence goes on."""
    return next((reason for reason, number in _FINISH_REASONS.items() if number == value), None)


def on_disconnect_from_proto(value: int) -> OnDisconnect:
    return OnDisconnect.RETAIN if value == types_pb2.ON_DISCONNECT_RETAIN else OnDisconnect.ABORT


def sampling_to_proto(params: SamplingParams) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        include_stop=params.include_stop,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
    )


def sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    """`max_tokens` is always set between services; floats are the fp32 values the wire carried."""
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        min_p=message.min_p,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop=message.include_stop,
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        logit_bias=tuple(sorted(message.logit_bias.items())),
    )


def request_to_proto(request: Request) -> types_pb2.EngineRequest:
    return types_pb2.EngineRequest(
        request_id=request.request_id,
        seed=request.seed,
        prompt_token_ids=request.prompt_token_ids,
        emitted_token_ids=request.emitted_token_ids,
        sampling=sampling_to_proto(request.sampling),
        numerics_digest=request.numerics_digest,
        timeout_ms=0 if request.timeout_s is None else max(1, int(request.timeout_s * 1000)),
        eos_token_ids=request.eos_token_ids,
        tenant=request.tenant,
        priority=request.priority,
    )


def request_from_proto(message: types_pb2.EngineRequest) -> Request:
    return Request(
        request_id=message.request_id,
        seed=message.seed,
        prompt_token_ids=tuple(message.prompt_token_ids),
        sampling=sampling_from_proto(message.sampling),
        eos_token_ids=tuple(message.eos_token_ids),
        emitted_token_ids=tuple(message.emitted_token_ids),
        numerics_digest=message.numerics_digest,
        timeout_s=message.timeout_ms / 1000 if message.timeout_ms else None,
        tenant=message.tenant,
        priority=message.priority,
    )


def token_to_proto(token: Token) -> types_pb2.Token:
    top = [types_pb2.TopLogprob(id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs]
    return types_pb2.Token(id=token.id, logprob=token.logprob, top_logprobs=top)


def token_from_proto(message: types_pb2.Token) -> Token:
    top = tuple((entry.id, entry.logprob) for entry in message.top_logprobs)
    return Token(message.id, message.logprob if message.HasField("logprob") else None, top)


def extent_to_proto(extent: Extent) -> types_pb2.Extent:
    return types_pb2.Extent(
        plane=extent.plane, layer=extent.layer, first_token=extent.first_token, num_tokens=extent.num_tokens
    )


def extent_from_proto(message: types_pb2.Extent) -> Extent:
    return Extent(message.plane, message.layer, message.first_token, message.num_tokens)


def target_to_proto(target: TransferTarget) -> prefill_pb2.TransferTarget:
    return prefill_pb2.TransferTarget(
        transfer_id=target.transfer_id,
        attempt=target.attempt,
        zmq_endpoint=target.zmq_endpoint,
        receiver_incarnation=target.receiver_incarnation,
        layout_fingerprint=target.layout_fingerprint,
        missing=[extent_to_proto(extent) for extent in target.missing],
    )


def target_from_proto(message: prefill_pb2.TransferTarget) -> TransferTarget:
    return TransferTarget(
        transfer_id=message.transfer_id,
        attempt=message.attempt,
        zmq_endpoint=message.zmq_endpoint,
        receiver_incarnation=message.receiver_incarnation,
        layout_fingerprint=message.layout_fingerprint,
        missing=tuple(extent_from_proto(extent) for extent in message.missing),
    )


def layout_to_proto(layout: KvLayout) -> types_pb2.KvLayout:
    planes = [
        types_pb2.Plane(
            name=plane.name,
            kind=_PLANE_KINDS[plane.kind],
            num_layers=plane.num_layers,
            row_elements=plane.row_elements,
            dtype=plane.dtype,
        )
        for plane in layout.planes
    ]
    return types_pb2.KvLayout(
        model_digest=layout.model_digest,
        planes=planes,
        block_size=layout.block_size,
        wire_version=layout.wire_version,
        fingerprint=layout.fingerprint,
    )


def layout_from_proto(message: types_pb2.KvLayout) -> KvLayout:
    """Raises ValueError for a plane kind this version does not know."""
    kinds = {number: kind for kind, number in _PLANE_KINDS.items()}
    if unknown := [plane.kind for plane in message.planes if plane.kind not in kinds]:
        raise ValueError(f"unknown plane kinds {unknown}")
    planes = tuple(Plane(p.name, kinds[p.kind], p.num_layers, p.row_elements, p.dtype) for p in message.planes)
    return KvLayout(message.model_digest, planes, message.block_size, message.wire_version)


def block_counts_to_proto(counts: BlockCounts) -> admin_pb2.BlockCounts:
    return admin_pb2.BlockCounts(
        total=counts.total,
        free=counts.free,
        cached=counts.cached,
        referenced=counts.referenced,
        draining=counts.draining,
    )
