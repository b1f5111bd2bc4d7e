"""The states of a handed-over block set, and the one table that Python, the in-memory twin and Lua all follow.

    RESERVED --> FILLING --> CLAIMED --> RELEASED
        \\___________\\__> ABORTED

RESERVED  the decode worker has set blocks aside; no byte has come.
FILLING   the first frame was verified; rows arrive. A rearm keeps the state and raises the attempt.
CLAIMED   every row and the commit are there; decode reads them.
RELEASED  the request ended and the blocks were given back.
ABORTED   cancelled, refused, or incomplete at the fill deadline.
"""

from enum import Enum


class HandoffState(Enum):
    RESERVED = "RESERVED"
    FILLING = "FILLING"
    CLAIMED = "CLAIMED"
    RELEASED = "RELEASED"
    ABORTED = "ABORTED"

    @property
    def is_final(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[HandoffState, frozenset[HandoffState]] = {
    HandoffState.RESERVED: frozenset({HandoffState.FILLING, HandoffState.ABORTED}),
    HandoffState.FILLING: frozenset({HandoffState.CLAIMED, HandoffState.ABORTED}),
    HandoffState.CLAIMED: frozenset({HandoffState.RELEASED}),
    HandoffState.RELEASED: frozenset(),
    HandoffState.ABORTED: frozenset(),
}


def is_allowed(current: HandoffState, to: HandoffState) -> bool:
    return to in TRANSITIONS[current]
