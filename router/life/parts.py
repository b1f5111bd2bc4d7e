"""What all request lives of a router share, and what one life shares with its attempts."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.routine import Routine
from isthmus.v1 import inference_pb2
from router.client.opened_request import OpenedRequest
from router.life.losses import AttemptFailed
from router.pool.decode_stream import MAX_BUFFERED_TOKENS
from router.pool.placement import Placement
from router.pool.policy import Need


@dataclass(frozen=True, slots=True)
class LifeParts:
    placement: Placement
    ledger: Ledger
    router_name: str
    queue_timeout_s: float
    failpoints: Failpoints = field(default_factory=Failpoints)
    max_buffered_tokens: int = MAX_BUFFERED_TOKENS  # what a client may leave unread


class ClaimedAttempt(Protocol):
    """An attempt, as far as its progress is concerned."""

    @property
    def has_claim(self) -> bool:
        """Decode has spoken: it has all blocks."""
        ...


class AfterFailure(Protocol):
    """What follows a request's first failure: `recovery.Recovery`."""

    def progressed(self, attempt: ClaimedAttempt) -> None:
        """Something came: what went wrong before may be over."""
        ...

    async def try_again(self, need: Need, failed: AttemptFailed, has_left: Callable[[], bool]) -> None: ...


@dataclass(eq=False, slots=True)
class AttemptContext:
    """What one request's life and its attempts share; they are one routine, which alone writes it."""

    parts: LifeParts
    routine: Routine
    opened: OpenedRequest
    tell: Callable[[inference_pb2.GenerateResponse], Awaitable[None]]
    recovery: AfterFailure | None = None  # from the first failure on

    @property
    def placement(self) -> Placement:
        return self.parts.placement

    def record(self, event: str, *, cause: str = "", transfer_id: str = "", **fields: object) -> None:
        self.opened.record(self.parts.ledger, event, cause=cause, transfer_id=transfer_id, **fields)
