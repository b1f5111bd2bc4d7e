from isthmus.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlockCounts(_message.Message):
    __slots__ = ("total", "free", "cached", "referenced", "draining")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    REFERENCED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    cached: int
    referenced: int
    draining: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., cached: _Optional[int] = ..., referenced: _Optional[int] = ..., draining: _Optional[int] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("name", "role", "incarnation", "grpc_address", "zmq_endpoint", "http_address", "serving", "state", "blocks", "num_streams", "num_queued", "pid", "numerics_digest", "layout_fingerprint", "seconds_since_progress")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ZMQ_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_PROGRESS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    incarnation: str
    grpc_address: str
    zmq_endpoint: str
    http_address: str
    serving: bool
    state: str
    blocks: BlockCounts
    num_streams: int
    num_queued: int
    pid: int
    numerics_digest: str
    layout_fingerprint: str
    seconds_since_progress: float
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., incarnation: _Optional[str] = ..., grpc_address: _Optional[str] = ..., zmq_endpoint: _Optional[str] = ..., http_address: _Optional[str] = ..., serving: bool = ..., state: _Optional[str] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., num_streams: _Optional[int] = ..., num_queued: _Optional[int] = ..., pid: _Optional[int] = ..., numerics_digest: _Optional[str] = ..., layout_fingerprint: _Optional[str] = ..., seconds_since_progress: _Optional[float] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("name", "role", "incarnation", "pid", "state", "serving", "reason", "model", "device", "dtype", "layout", "numerics_digest", "numerics_ingredients", "blocks", "num_streams", "num_queued", "uptime_s", "num_steps", "counters", "workers", "grpc_address", "zmq_endpoint", "http_address", "num_tasks", "num_threads", "num_fds")
    class NumericsIngredientsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_INGREDIENTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_STREAMS_FIELD_NUMBER: _ClassVar[int]
    NUM_QUEUED_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ZMQ_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_TASKS_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    NUM_FDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    incarnation: str
    pid: int
    state: str
    serving: bool
    reason: str
    model: str
    device: str
    dtype: str
    layout: _types_pb2.KvLayout
    numerics_digest: str
    numerics_ingredients: _containers.ScalarMap[str, str]
    blocks: BlockCounts
    num_streams: int
    num_queued: int
    uptime_s: float
    num_steps: int
    counters: _containers.ScalarMap[str, int]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    grpc_address: str
    zmq_endpoint: str
    http_address: str
    num_tasks: int
    num_threads: int
    num_fds: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., incarnation: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., serving: bool = ..., reason: _Optional[str] = ..., model: _Optional[str] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., layout: _Optional[_Union[_types_pb2.KvLayout, _Mapping]] = ..., numerics_digest: _Optional[str] = ..., numerics_ingredients: _Optional[_Mapping[str, str]] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., num_streams: _Optional[int] = ..., num_queued: _Optional[int] = ..., uptime_s: _Optional[float] = ..., num_steps: _Optional[int] = ..., counters: _Optional[_Mapping[str, int]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., grpc_address: _Optional[str] = ..., zmq_endpoint: _Optional[str] = ..., http_address: _Optional[str] = ..., num_tasks: _Optional[int] = ..., num_threads: _Optional[int] = ..., num_fds: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("drained", "num_left")
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    num_left: int
    def __init__(self, drained: bool = ..., num_left: _Optional[int] = ...) -> None: ...

class LedgerRequest(_message.Message):
    __slots__ = ("request_id", "limit")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    limit: int
    def __init__(self, request_id: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class LedgerEvent(_message.Message):
    __slots__ = ("sequence", "monotonic_ns", "event", "request_id", "transfer_id", "attempt", "cause", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_NS_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    monotonic_ns: int
    event: str
    request_id: str
    transfer_id: str
    attempt: int
    cause: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, sequence: _Optional[int] = ..., monotonic_ns: _Optional[int] = ..., event: _Optional[str] = ..., request_id: _Optional[str] = ..., transfer_id: _Optional[str] = ..., attempt: _Optional[int] = ..., cause: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LedgerResponse(_message.Message):
    __slots__ = ("incarnation", "events", "monotonic_ns", "name", "role")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_NS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    events: _containers.RepeatedCompositeFieldContainer[LedgerEvent]
    monotonic_ns: int
    name: str
    role: str
    def __init__(self, incarnation: _Optional[str] = ..., events: _Optional[_Iterable[_Union[LedgerEvent, _Mapping]]] = ..., monotonic_ns: _Optional[int] = ..., name: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...
