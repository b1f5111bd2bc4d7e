"""How a sender is set up."""

from dataclasses import dataclass, field

from isthmus.failpoints import Failpoints


@dataclass(frozen=True, slots=True)
class SenderOptions:
    staging_bytes: int = 64 * 2**20
    max_frame_bytes: int = 4 * 2**20
    ack_timeout_s: float = 5.0  # without any answer
    idle_link_s: float = 60.0
    max_transfers: int = 1024
    failpoints: Failpoints = field(default_factory=Failpoints)
