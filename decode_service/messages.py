"""Session messages from the decode worker's records; pure."""

from collections.abc import Sequence
from dataclasses import replace

from decode_service.reader import AttachKey
from decode_service.stream import ServedStream
from decode_service.stream_run import Ended
from isthmus.convert import extent_to_proto, finish_reason_to_proto, request_to_proto, token_to_proto
from isthmus.errors import IsthmusError
from isthmus.kv.layout import KvLayout
from isthmus.types import Token
from isthmus.v1 import decode_pb2, types_pb2
from kv_transfer.coverage import clipped
from kv_transfer.receiver_events import FailedTransfer


def stream_tokens(stream: ServedStream, tokens: Sequence[Token]) -> decode_pb2.StreamTokens:
    """A stream's part of a step's message: these tokens, the first of which the reader has not been sent yet."""
    return decode_pb2.StreamTokens(
        request_id=stream.request_id,
        counter=stream.reader.attach.counter,
        index=stream.reader.num_sent,
        tokens=map(token_to_proto, tokens),
    )


def stream_ended(stream: ServedStream, ended: Ended) -> decode_pb2.StreamEnded:
    return decode_pb2.StreamEnded(
        request_id=stream.request_id,
        counter=stream.reader.attach.counter,
        finish_reason=finish_reason_to_proto(ended.finish_reason),
        num_tokens=len(stream.tokens),
        reason=ended.reason,
        detail=ended.detail,
    )


def refused(request_id: str, counter: int, error: IsthmusError) -> decode_pb2.Refused:
    return decode_pb2.Refused(
        request_id=request_id,
        counter=counter,
        reason=error.reason,
        detail=error.detail,
        retry_after_ms=int((error.retry_after_s or 0) * 1000),
    )


def transfer_failed(stream: ServedStream, failure: FailedTransfer, layout: KvLayout) -> decode_pb2.TransferFailed:
    missing = clipped(failure.missing, stream.num_prompt_tokens)
    return decode_pb2.TransferFailed(
        request_id=stream.request_id,
        transfer_id=stream.transfer_id,
        attempt=failure.attempt,
        counter=stream.reader.attach.counter,
        missing=[extent_to_proto(extent, layout) for extent in missing],
        reason=failure.reason,
    )


def rearmed(stream: ServedStream, layout: KvLayout) -> decode_pb2.Rearmed:
    return decode_pb2.Rearmed(
        request_id=stream.request_id,
        transfer_id=stream.transfer_id,
        attempt=stream.attempt,
        missing=[extent_to_proto(extent, layout) for extent in stream.missing],
    )


def attached(stream: ServedStream, next_index: int) -> decode_pb2.Attached:
    """The stream's whole record: what its router needs to go on without this worker."""
    reader = stream.reader
    ids = [token.id for token in stream.tokens]
    known = (*ids, *stream.request.emitted_token_ids[len(ids) :])
    aborts = reader.retention_s is None
    return decode_pb2.Attached(
        request=request_to_proto(replace(stream.request, emitted_token_ids=known)),
        attach=_attach_id(reader.attach),
        next_index=next_index,
        on_disconnect=types_pb2.ON_DISCONNECT_ABORT if aborts else types_pb2.ON_DISCONNECT_RETAIN,
        retention_s=int(reader.retention_s or 0),
    )


def detached(stream: ServedStream, attach: AttachKey) -> decode_pb2.Detached:
    """`attach`: who has the stream now."""
    return decode_pb2.Detached(request_id=stream.request_id, attach=_attach_id(attach))


def moved(request_id: str, transfer_id: str, failure: str) -> decode_pb2.Moved:
    """`failure` is empty when the other worker has the stream."""
    return decode_pb2.Moved(request_id=request_id, transfer_id=transfer_id, acked=not failure, failure=failure)


def _attach_id(key: AttachKey) -> decode_pb2.AttachId:
    return decode_pb2.AttachId(router_incarnation=key.router_incarnation, counter=key.counter)
