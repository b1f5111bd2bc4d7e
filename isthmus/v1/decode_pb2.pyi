from isthmus.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachId(_message.Message):
    __slots__ = ("router_incarnation", "counter")
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    router_incarnation: str
    counter: int
    def __init__(self, router_incarnation: _Optional[str] = ..., counter: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("hello", "reserve", "rearm", "attach", "cancel", "release", "move")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    REARM_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    MOVE_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    reserve: Reserve
    rearm: Rearm
    attach: Attach
    cancel: CancelStream
    release: Release
    move: Move
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., reserve: _Optional[_Union[Reserve, _Mapping]] = ..., rearm: _Optional[_Union[Rearm, _Mapping]] = ..., attach: _Optional[_Union[Attach, _Mapping]] = ..., cancel: _Optional[_Union[CancelStream, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., move: _Optional[_Union[Move, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("hello", "reserved", "refused", "step", "ended", "transfer_failed", "rearmed", "attached", "detached", "moved", "leaving")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FAILED_FIELD_NUMBER: _ClassVar[int]
    REARMED_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    DETACHED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    hello: DecodeHello
    reserved: Reserved
    refused: Refused
    step: StepTokens
    ended: StreamEnded
    transfer_failed: TransferFailed
    rearmed: Rearmed
    attached: Attached
    detached: Detached
    moved: Moved
    leaving: Leaving
    def __init__(self, hello: _Optional[_Union[DecodeHello, _Mapping]] = ..., reserved: _Optional[_Union[Reserved, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., step: _Optional[_Union[StepTokens, _Mapping]] = ..., ended: _Optional[_Union[StreamEnded, _Mapping]] = ..., transfer_failed: _Optional[_Union[TransferFailed, _Mapping]] = ..., rearmed: _Optional[_Union[Rearmed, _Mapping]] = ..., attached: _Optional[_Union[Attached, _Mapping]] = ..., detached: _Optional[_Union[Detached, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ...) -> None: ...

class StreamCursor(_message.Message):
    __slots__ = ("request_id", "next_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    next_index: int
    def __init__(self, request_id: _Optional[str] = ..., next_index: _Optional[int] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_incarnation", "streams")
    ROUTER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    router_incarnation: str
    streams: _containers.RepeatedCompositeFieldContainer[StreamCursor]
    def __init__(self, router_incarnation: _Optional[str] = ..., streams: _Optional[_Iterable[_Union[StreamCursor, _Mapping]]] = ...) -> None: ...

class DecodeHello(_message.Message):
    __slots__ = ("incarnation", "layout", "numerics_digest", "unknown_streams")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_STREAMS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    layout: _types_pb2.KvLayout
    numerics_digest: str
    unknown_streams: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, incarnation: _Optional[str] = ..., layout: _Optional[_Union[_types_pb2.KvLayout, _Mapping]] = ..., numerics_digest: _Optional[str] = ..., unknown_streams: _Optional[_Iterable[str]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("request", "attach", "on_disconnect", "retention_s", "fill_timeout_ms", "moves")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    RETENTION_S_FIELD_NUMBER: _ClassVar[int]
    FILL_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    request: _types_pb2.EngineRequest
    attach: AttachId
    on_disconnect: _types_pb2.OnDisconnect
    retention_s: int
    fill_timeout_ms: int
    moves: bool
    def __init__(self, request: _Optional[_Union[_types_pb2.EngineRequest, _Mapping]] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ..., on_disconnect: _Optional[_Union[_types_pb2.OnDisconnect, str]] = ..., retention_s: _Optional[int] = ..., fill_timeout_ms: _Optional[int] = ..., moves: bool = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("request_id", "transfer_id", "attempt", "zmq_endpoint", "incarnation", "layout_fingerprint", "num_cached_tokens", "missing", "counter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ZMQ_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    attempt: int
    zmq_endpoint: str
    incarnation: str
    layout_fingerprint: str
    num_cached_tokens: int
    missing: _containers.RepeatedCompositeFieldContainer[_types_pb2.Extent]
    counter: int
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., zmq_endpoint: _Optional[str] = ..., incarnation: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., num_cached_tokens: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[_types_pb2.Extent, _Mapping]]] = ..., counter: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("request_id", "reason", "detail", "retry_after_ms", "counter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    detail: str
    retry_after_ms: int
    counter: int
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., retry_after_ms: _Optional[int] = ..., counter: _Optional[int] = ...) -> None: ...

class StepTokens(_message.Message):
    __slots__ = ("step", "streams")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    step: int
    streams: _containers.RepeatedCompositeFieldContainer[StreamTokens]
    def __init__(self, step: _Optional[int] = ..., streams: _Optional[_Iterable[_Union[StreamTokens, _Mapping]]] = ...) -> None: ...

class StreamTokens(_message.Message):
    __slots__ = ("request_id", "index", "tokens", "counter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    tokens: _containers.RepeatedCompositeFieldContainer[_types_pb2.Token]
    counter: int
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[_types_pb2.Token, _Mapping]]] = ..., counter: _Optional[int] = ...) -> None: ...

class StreamEnded(_message.Message):
    __slots__ = ("request_id", "finish_reason", "num_tokens", "reason", "detail", "counter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    finish_reason: _types_pb2.FinishReason
    num_tokens: int
    reason: str
    detail: str
    counter: int
    def __init__(self, request_id: _Optional[str] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., num_tokens: _Optional[int] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ..., counter: _Optional[int] = ...) -> None: ...

class TransferFailed(_message.Message):
    __slots__ = ("request_id", "transfer_id", "attempt", "missing", "reason", "counter")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    attempt: int
    missing: _containers.RepeatedCompositeFieldContainer[_types_pb2.Extent]
    reason: str
    counter: int
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[_types_pb2.Extent, _Mapping]]] = ..., reason: _Optional[str] = ..., counter: _Optional[int] = ...) -> None: ...

class Rearm(_message.Message):
    __slots__ = ("request_id", "transfer_id", "attempt", "attach", "fill_timeout_ms")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    FILL_TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    attempt: int
    attach: AttachId
    fill_timeout_ms: int
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ..., fill_timeout_ms: _Optional[int] = ...) -> None: ...

class Rearmed(_message.Message):
    __slots__ = ("request_id", "transfer_id", "attempt", "missing")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    attempt: int
    missing: _containers.RepeatedCompositeFieldContainer[_types_pb2.Extent]
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[_types_pb2.Extent, _Mapping]]] = ...) -> None: ...

class Attach(_message.Message):
    __slots__ = ("request_id", "attach", "next_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attach: AttachId
    next_index: int
    def __init__(self, request_id: _Optional[str] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ..., next_index: _Optional[int] = ...) -> None: ...

class Attached(_message.Message):
    __slots__ = ("request", "attach", "next_index", "on_disconnect", "retention_s")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    RETENTION_S_FIELD_NUMBER: _ClassVar[int]
    request: _types_pb2.EngineRequest
    attach: AttachId
    next_index: int
    on_disconnect: _types_pb2.OnDisconnect
    retention_s: int
    def __init__(self, request: _Optional[_Union[_types_pb2.EngineRequest, _Mapping]] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ..., next_index: _Optional[int] = ..., on_disconnect: _Optional[_Union[_types_pb2.OnDisconnect, str]] = ..., retention_s: _Optional[int] = ...) -> None: ...

class Detached(_message.Message):
    __slots__ = ("request_id", "attach")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attach: AttachId
    def __init__(self, request_id: _Optional[str] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ...) -> None: ...

class CancelStream(_message.Message):
    __slots__ = ("request_id", "attach", "finish_reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attach: AttachId
    finish_reason: _types_pb2.FinishReason
    def __init__(self, request_id: _Optional[str] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("request_id", "attach")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attach: AttachId
    def __init__(self, request_id: _Optional[str] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("request_id", "attach", "target")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attach: AttachId
    target: Reserved
    def __init__(self, request_id: _Optional[str] = ..., attach: _Optional[_Union[AttachId, _Mapping]] = ..., target: _Optional[_Union[Reserved, _Mapping]] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("request_id", "transfer_id", "acked", "failure")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    transfer_id: str
    acked: bool
    failure: str
    def __init__(self, request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., acked: bool = ..., failure: _Optional[str] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FindRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class FindResponse(_message.Message):
    __slots__ = ("found", "next_index")
    FOUND_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    found: bool
    next_index: int
    def __init__(self, found: bool = ..., next_index: _Optional[int] = ...) -> None: ...
