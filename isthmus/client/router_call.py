"""One call to a router as a value: a core says which call comes next, a driver makes it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RouterCall:
    """A call of isthmus.v1.InferenceService."""

    address: str  # host:port of the router
    method: str  # as the proto file names it
    message: Any  # the request's protobuf message
    timeout_s: float
