"""What all request lives of a router share."""

from dataclasses import dataclass, field

from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from router.pool.decode_stream import MAX_BUFFERED_TOKENS
from router.pool.placement import Placement


@dataclass(frozen=True, slots=True)
class LifeParts:
    placement: Placement
    ledger: Ledger
    router_name: str
    queue_timeout_s: float
    failpoints: Failpoints = field(default_factory=Failpoints)
    max_buffered_tokens: int = MAX_BUFFERED_TOKENS  # what a client may leave unread
