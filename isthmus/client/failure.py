"""How a call to a router failed, and what that lets the client do. Values only; no I/O."""

from dataclasses import dataclass
from enum import Enum

from isthmus.errors import (
    Draining,
    IndexOutOfRange,
    IsthmusError,
    Overloaded,
    StaleOwner,
    StreamGone,
    TransferIncomplete,
    WorkerLost,
    WorkersUnavailable,
)


class FailureKind(Enum):
    """What the client may do after a failed call."""

    BROKEN = "broken"  # a connection, router or worker was lost: the client is free to go on elsewhere
    REFUSED = "refused"  # a bound was reached: to ask again is extra load
    GONE = "gone"  # nobody holds the stream any more, or it does not reach so far
    FINAL = "final"  # the error is the caller's to handle


@dataclass(frozen=True, slots=True)
class CallFailure:
    """How a call ended."""

    error: IsthmusError
    kind: FailureKind
    is_connection_lost: bool = False  # the connection ended the call, not a router

    @classmethod
    def told(cls, error: IsthmusError) -> "CallFailure":
        """The failure that a router told with a typed error."""
        match error:
            case StreamGone() | IndexOutOfRange():
                kind = FailureKind.GONE
            case WorkerLost() | Draining() | TransferIncomplete() | StaleOwner():
                kind = FailureKind.BROKEN
            case Overloaded() | WorkersUnavailable():
                kind = FailureKind.REFUSED
            case _:
                kind = FailureKind.FINAL
        return cls(error, kind)

    @classmethod
    def of_connection(cls, error: IsthmusError) -> "CallFailure":
        """The failure of a call whose connection was lost."""
        return cls(error, FailureKind.BROKEN, is_connection_lost=True)
