"""Which router to ask, how long to wait before asking again, when to give up. No I/O; the clock is passed in."""

import math
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import grpc

from isthmus.clock import Clock
from isthmus.errors import (
    DeadlinePassed,
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
from isthmus.process.rpc_errors import error_from_rpc

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 0.5
SUSPECT_S = 2.0  # a router that failed is asked last for so long
MAX_REFUSALS = 10  # of one request
ROUTER_TIMEOUT_S = 30.0
UNARY_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 1.0
ID_TIMEOUT_S = 1.0  # an id on its way when the caller leaves is waited for: without it nobody can end the request
_DETAILS_KEY = "grpc-status-details-bin"
# What the C core reports when a connection, not a router, ended the call.
_TRANSPORT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
}


class Kind(Enum):
    BROKEN = "broken"  # a connection, router or worker was lost: free to go on elsewhere
    REFUSED = "refused"  # a bound was reached: asking again is extra load
    GONE = "gone"  # nobody holds the stream, or not so far
    FINAL = "final"


@dataclass(frozen=True, slots=True)
class Failure:
    """How a call ended."""

    error: IsthmusError
    is_transport: bool = False
    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    @classmethod
    def of(cls, error: Any) -> "Failure":
        """Of a grpc.RpcError, blocking or not."""
        has_details = any(key == _DETAILS_KEY for key, _ in error.trailing_metadata() or ())
        return cls(error_from_rpc(error), is_transport=not has_details, code=error.code())

    def kind(self) -> Kind:
        if self.is_transport:
            return Kind.BROKEN if self.code in _TRANSPORT else Kind.FINAL
        match self.error:
            case StreamGone() | IndexOutOfRange():
                return Kind.GONE
            case WorkerLost() | Draining() | TransferIncomplete() | StaleOwner():
                return Kind.BROKEN
            case Overloaded() | WorkersUnavailable():
                return Kind.REFUSED
            case _:
                return Kind.FINAL


class RetryBudget:
    """Refused requests asked again: at most 10 % of all requests, and a burst. Any thread."""

    CAPACITY, PER_REQUEST = 50.0, 0.1

    def __init__(self) -> None:
        self._tokens = self.CAPACITY
        self._lock = threading.Lock()

    def deposit(self) -> None:
        with self._lock:
            self._tokens = min(self.CAPACITY, self._tokens + self.PER_REQUEST)

    def withdraw(self) -> bool:
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True


@dataclass(eq=False, slots=True)
class Router:
    address: str
    suspect_until: float = -math.inf


class Routers:
    """The addresses a client was given, in turn; those that failed lately last. Any thread: races cost a turn."""

    def __init__(self, addresses: str | Sequence[str], clock: Clock):
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        self.all = [Router(address) for address in dict.fromkeys(item.strip() for item in given) if address]
        if not self.all:
            raise ValueError("no router address")
        self.budget = RetryBudget()
        self.clock = clock
        self._turn = -1

    @property
    def names(self) -> str:
        return ", ".join(router.address for router in self.all)

    def pick(self, not_before: dict[Router, float]) -> Router:
        """`not_before`: what routers asked of this request."""
        self._turn = (self._turn + 1) % len(self.all)
        now = self.clock.now()
        rotated = self.all[self._turn :] + self.all[: self._turn]
        return min(rotated, key=lambda router: (router.suspect_until > now, not_before.get(router, now) - now))


class Attempts:
    """The calls of one request, one after another. Owned by whoever makes them."""

    def __init__(self, routers: Routers, *, timeout_s: float, router_timeout_s: float):
        self._routers = routers
        self._now = routers.clock.now
        self._deadline = self._now() + timeout_s
        self._router_timeout_s = router_timeout_s
        self._away_since: float | None = None
        self._not_before: dict[Router, float] = {}
        self._num_refusals = 0
        self._backoff_s = MIN_BACKOFF_S
        self.router = routers.pick({})
        routers.budget.deposit()

    def remaining_s(self) -> float:
        """What the next call may take. Raises DeadlinePassed."""
        remaining_s = self._deadline - self._now()
        if remaining_s <= 0:
            raise DeadlinePassed("the deadline passed")
        return remaining_s

    def progressed(self) -> None:
        self._backoff_s = MIN_BACKOFF_S
        self._away_since = None

    def failed(self, failure: Failure) -> float:
        """Of a call that can be repeated: seconds to wait before asking `router`. Raises what ends the request."""
        match failure.kind():
            case Kind.BROKEN:
                return self.broken(failure, may_give_up=True)
            case Kind.REFUSED:
                return self.refused(failure)
            case _:
                raise failure.error

    def broken(self, failure: Failure, *, may_give_up: bool) -> float:
        """Repeated until the deadline; while no router ever took the request, only for the router timeout."""
        now, error = self._now(), failure.error
        if failure.is_transport or isinstance(error, Draining):
            self.router.suspect_until = now + SUSPECT_S
        self._away_since = now if self._away_since is None else self._away_since
        if may_give_up and now - self._away_since > self._router_timeout_s:
            raise WorkersUnavailable(f"no router answers at {self._routers.names}: {error.detail}") from error
        delay_s = self._next(error)
        if now + delay_s >= self._deadline:
            raise DeadlinePassed(f"the deadline passed without a router: {error.detail}") from error
        return delay_s

    def refused(self, failure: Failure) -> float:
        """Repeated as the budget and the deadline allow; else the refusal is raised."""
        if isinstance(failure.error, WorkersUnavailable):  # another router may see workers that this one does not
            self.router.suspect_until = self._now() + min(SUSPECT_S, failure.error.retry_after_s or 0.0)
        self._num_refusals += 1
        if self._num_refusals > MAX_REFUSALS or not self._routers.budget.withdraw():
            raise failure.error
        delay_s = self._next(failure.error)
        if self._now() + delay_s >= self._deadline:
            raise failure.error
        return delay_s

    def _next(self, error: IsthmusError) -> float:
        now = self._now()
        if error.retry_after_s is not None:
            self._not_before[self.router] = now + error.retry_after_s
        self.router = self._routers.pick(self._not_before)
        backoff_s = self._backoff_s * random.uniform(0.5, 1)
        self._backoff_s = min(MAX_BACKOFF_S, 2 * self._backoff_s)
        return max(backoff_s, self._not_before.get(self.router, now) - now)
