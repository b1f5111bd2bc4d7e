"""Session messages from the decode worker's records; pure."""

from collections.abc import Sequence

from decode_service.stream import Emission, Ended, Stream
from isthmus.convert import extent_to_proto, finish_reason_to_proto, token_to_proto
from isthmus.errors import IsthmusError
from isthmus.types import Extent
from isthmus.v1 import decode_pb2

Response = decode_pb2.SessionResponse


def step_tokens(step: int, emissions: Sequence[Emission]) -> Response:
    """One message for all of a router's streams; only emissions that carry a token."""
    streams = [
        decode_pb2.StreamTokens(
            request_id=emission.stream.request_id, index=emission.index, tokens=[token_to_proto(emission.token)]
        )
        for emission in emissions
        if emission.token is not None
    ]
    return Response(step=decode_pb2.StepTokens(step=step, streams=streams))


def stream_ended(stream: Stream, ended: Ended) -> Response:
    return Response(
        ended=decode_pb2.StreamEnded(
            request_id=stream.request_id,
            finish_reason=finish_reason_to_proto(ended.finish_reason),
            num_tokens=len(stream.token_ids),
            reason=ended.reason,
            detail=ended.detail,
        )
    )


def refused(request_id: str, error: IsthmusError) -> Response:
    return Response(
        refused=decode_pb2.Refused(
            request_id=request_id,
            reason=error.reason,
            detail=error.detail,
            retry_after_ms=int((error.retry_after_s or 0) * 1000),
        )
    )


def transfer_failed(stream: Stream, missing: Sequence[Extent], reason: str) -> Response:
    return Response(
        transfer_failed=decode_pb2.TransferFailed(
            request_id=stream.request_id,
            transfer_id=stream.transfer_id,
            attempt=stream.attempt,
            missing=[extent_to_proto(extent) for extent in missing],
            reason=reason,
        )
    )
