"""The ledger: every state change of requests, blocks and transfers, in a bounded ring read through AdminService."""

import threading
from collections import deque
from dataclasses import dataclass, field

from isthmus.clock import Clock


@dataclass(frozen=True, slots=True)
class LedgerEvent:
    sequence: int
    monotonic_ns: int  # of the clock; CLOCK_MONOTONIC is comparable between processes of one machine
    event: str  # e.g. "handoff.claimed"
    request_id: str = ""
    transfer_id: str = ""
    attempt: int = 0
    cause: str = ""
    fields: dict[str, str] = field(default_factory=dict[str, str])


class Ledger:
    """A ring of the newest `capacity` events. Any thread may write; the oldest go first."""

    def __init__(self, clock: Clock, capacity: int = 20_000):
        self._clock = clock
        self._events: deque[LedgerEvent] = deque(maxlen=capacity)
        self._lock = threading.Lock()
        self._sequence = 0

    def record(
        self,
        event: str,
        *,
        request_id: str = "",
        transfer_id: str = "",
        attempt: int = 0,
        cause: str = "",
        **fields: object,
    ) -> None:
        values = {name: str(value) for name, value in fields.items()}
        with self._lock:
            self._sequence += 1
            now_ns = self._clock.now_ns()
            self._events.append(
                LedgerEvent(self._sequence, now_ns, event, request_id, transfer_id, attempt, cause, values)
            )

    def read(self, *, request_id: str = "", limit: int = 1000) -> list[LedgerEvent]:
        """The newest `limit` events, oldest first; of one request, or of the transfer that has this id."""
        with self._lock:
            events = list(self._events)
        if request_id:
            events = [event for event in events if request_id in (event.request_id, event.transfer_id)]
        return events[-limit:]
