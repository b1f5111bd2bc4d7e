"""The error tree. Each class fixes its gRPC status, ErrorInfo reason, HTTP status and OpenAI type, for all faces."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldViolation:
    field: str
    description: str  # what was given and what is allowed


class IsthmusError(Exception):
    """Root of every expected failure. `detail` is safe to show a client."""

    grpc_status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    def __init__(self, detail: str, *, retry_after_s: float | None = None, violations: tuple[FieldViolation, ...] = ()):
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.violations = violations


class InvalidRequest(IsthmusError):
    """The request itself is wrong; sending it again gives the same answer."""

    grpc_status = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"
    http_status = 400
    openai_type = "invalid_request_error"

    @classmethod
    def of(cls, field: str, given: object, allowed: str) -> "InvalidRequest":
        shown = repr(given)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        violation = FieldViolation(field, f"given {shown}; allowed: {allowed}")
        return cls(f"{field}: {violation.description}", violations=(violation,))


class ModelNotFound(IsthmusError):
    grpc_status = "NOT_FOUND"
    reason = "MODEL_NOT_FOUND"
    http_status = 404
    openai_type = "invalid_request_error"


class Overloaded(IsthmusError):
    """A bound was reached; nothing was started. Carries RetryInfo."""

    grpc_status = "RESOURCE_EXHAUSTED"
    reason = "OVERLOADED"
    http_status = 429
    openai_type = "rate_limit_error"


class NoFreeBlocks(Overloaded):
    reason = "NO_FREE_BLOCKS"


class WorkersUnavailable(IsthmusError):
    """No worker of the needed role and numerics class is alive. Carries RetryInfo."""

    grpc_status = "UNAVAILABLE"
    reason = "WORKERS_UNAVAILABLE"
    http_status = 503


class Draining(IsthmusError):
    grpc_status = "UNAVAILABLE"
    reason = "DRAINING"
    http_status = 503


class WorkerLost(IsthmusError):
    grpc_status = "UNAVAILABLE"
    reason = "WORKER_LOST"
    http_status = 503


class DeadlinePassed(IsthmusError):
    grpc_status = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_PASSED"
    http_status = 504


class RequestCancelled(IsthmusError):
    grpc_status = "CANCELLED"
    reason = "CANCELLED"
    http_status = 499


class SlowClient(IsthmusError):
    """The client did not read and its buffer reached the bound."""

    grpc_status = "RESOURCE_EXHAUSTED"
    reason = "SLOW_CLIENT"
    http_status = 429


class NumericsMismatch(IsthmusError):
    """No worker of the stream's numerics class is left."""

    grpc_status = "FAILED_PRECONDITION"
    reason = "NUMERICS_MISMATCH"
    http_status = 503


class LayoutMismatch(IsthmusError):
    grpc_status = "FAILED_PRECONDITION"
    reason = "LAYOUT_MISMATCH"
    http_status = 503


class StaleOwner(IsthmusError):
    """A message for another incarnation, attempt or attach counter: refused before memory is touched."""

    grpc_status = "ABORTED"
    reason = "STALE_OWNER"
    http_status = 409


class StreamGone(IsthmusError):
    """Nobody holds the stream: it can be continued from its emitted tokens and its seed."""

    grpc_status = "NOT_FOUND"
    reason = "STREAM_GONE"
    http_status = 404
    openai_type = "invalid_request_error"


class IndexOutOfRange(IsthmusError):
    """Resume from an index the stream has not reached."""

    grpc_status = "OUT_OF_RANGE"
    reason = "INDEX_OUT_OF_RANGE"
    http_status = 400
    openai_type = "invalid_request_error"


class AttachedElsewhere(IsthmusError):
    """Another call took the stream over; this one gets nothing more."""

    grpc_status = "ABORTED"
    reason = "ATTACHED_ELSEWHERE"
    http_status = 409


class RequestKillsWorkers(IsthmusError):
    """Two workers were lost at the same point of this request; it is not given to a third."""

    grpc_status = "INTERNAL"
    reason = "REQUEST_KILLS_WORKERS"


class TransferIncomplete(IsthmusError):
    """Blocks did not arrive, or were refused, within the fill deadline."""

    grpc_status = "UNAVAILABLE"
    reason = "TRANSFER_INCOMPLETE"
    http_status = 503


class NonFiniteLogits(IsthmusError):
    """The model gave NaN or infinity for this sequence; others in the batch are not affected."""

    grpc_status = "INTERNAL"
    reason = "NON_FINITE_LOGITS"


class DataLoss(IsthmusError):
    """A replayed token differs from the emitted one."""

    grpc_status = "DATA_LOSS"
    reason = "REPLAY_MISMATCH"


class NotYet(IsthmusError):
    """Part of the protocol that this version does not serve yet."""

    grpc_status = "UNIMPLEMENTED"
    reason = "NOT_IMPLEMENTED"
    http_status = 501


class CannotStart(IsthmusError):
    """A process cannot start: names the setting and how to mend it; the process exits with status 2."""

    grpc_status = "FAILED_PRECONDITION"
    reason = "CANNOT_START"

    def __init__(self, setting: str, problem: str, mend: str):
        super().__init__(f"cannot start: {setting}: {problem}. To mend it: {mend}")
        self.setting = setting


def reason_of(error: BaseException) -> str:
    """A word for logs and ledgers: the reason of an expected failure, the type's name of any other."""
    return error.reason if isinstance(error, IsthmusError) else type(error).__name__
