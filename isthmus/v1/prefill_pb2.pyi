from isthmus.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TransferTarget(_message.Message):
    __slots__ = ("transfer_id", "attempt", "zmq_endpoint", "receiver_incarnation", "layout_fingerprint", "missing")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    ZMQ_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    transfer_id: str
    attempt: int
    zmq_endpoint: str
    receiver_incarnation: str
    layout_fingerprint: str
    missing: _containers.RepeatedCompositeFieldContainer[_types_pb2.Extent]
    def __init__(self, transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., zmq_endpoint: _Optional[str] = ..., receiver_incarnation: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., missing: _Optional[_Iterable[_Union[_types_pb2.Extent, _Mapping]]] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request", "target")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    request: _types_pb2.EngineRequest
    target: TransferTarget
    def __init__(self, request: _Optional[_Union[_types_pb2.EngineRequest, _Mapping]] = ..., target: _Optional[_Union[TransferTarget, _Mapping]] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("queued", "progress", "first_token", "done")
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    queued: Queued
    progress: Progress
    first_token: FirstToken
    done: Done
    def __init__(self, queued: _Optional[_Union[Queued, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Queued(_message.Message):
    __slots__ = ("num_ahead",)
    NUM_AHEAD_FIELD_NUMBER: _ClassVar[int]
    num_ahead: int
    def __init__(self, num_ahead: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("num_computed_tokens",)
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_computed_tokens: int
    def __init__(self, num_computed_tokens: _Optional[int] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token", "finish_reason", "num_cached_tokens")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token: _types_pb2.Token
    finish_reason: _types_pb2.FinishReason
    num_cached_tokens: int
    def __init__(self, token: _Optional[_Union[_types_pb2.Token, _Mapping]] = ..., finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("acked", "failure", "prefill_ms", "transfer_exposed_ms", "transfer_bytes", "transfer_blocks", "transfer_frames")
    ACKED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_EXPOSED_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FRAMES_FIELD_NUMBER: _ClassVar[int]
    acked: bool
    failure: str
    prefill_ms: float
    transfer_exposed_ms: float
    transfer_bytes: int
    transfer_blocks: int
    transfer_frames: int
    def __init__(self, acked: bool = ..., failure: _Optional[str] = ..., prefill_ms: _Optional[float] = ..., transfer_exposed_ms: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., transfer_blocks: _Optional[int] = ..., transfer_frames: _Optional[int] = ...) -> None: ...
