"""A worker's lease: what to write at a beat, what the answer means, and when the next beat is due.

A driver (`lease_thread.py`) beats while the worker lives:

    begin(record) --> put_worker --> renewed(found, now)
        --> blocks.publish, where must_publish(snapshot) says so --> published(snapshot) --> rest(now)

Each renewal returns what the store held until then. Anything but what was written last means that the store was
flushed, rolled back or overwritten, and that the worker has to say again what is its own there.
"""

from dataclasses import dataclass, replace

from kv_transfer.counters import Counters
from kv_transfer.ownership.store import BlockSnapshot, Renewed, WorkerRecord

_AT_ONCE = float("-inf")


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """Seconds from the end of one beat to the next, and for how long the store remembers a worker that is silent."""

    heartbeat_s: float
    ttl_s: float


class Lease:
    """What was written last, and when. Its driver is the one caller of its methods; any thread may read `last_ok`."""

    def __init__(self, terms: LeaseTerms, counters: Counters):
        self.terms = terms
        self.call_at = _AT_ONCE  # when the next beat is due
        self.last_ok: float | None = None  # when the store last confirmed a renewal; None: it never did
        self._counters = counters
        self._sent: WorkerRecord | None = None  # by the beat under way
        self._written: Renewed | None = None  # what the next renewal should find

    def begin(self, record: WorkerRecord) -> WorkerRecord:
        """The record to write at this beat. It carries the renewal's number, which tells it from an older copy."""
        self._sent = replace(record, renewal=self._counters["lease.renewed"])
        return self._sent

    def renewed(self, found: Renewed, now: float) -> bool:
        """The store took the record. True when it did not hold what was written last: it has lost or changed data."""
        expected = self._written
        self._counters.add("lease.renewed")
        self.last_ok = now
        self._written = Renewed(self._sent, found.blocks)
        if expected is None or found == expected:
            return False
        self._counters.add("lease.store_lost")
        return True

    def must_publish(self, snapshot: BlockSnapshot) -> bool:
        """Whether the store holds another block snapshot than this one, or none."""
        return self._written is None or self._written.blocks != snapshot.stamp

    def published(self, snapshot: BlockSnapshot) -> None:
        """The store took the snapshot."""
        self._written = Renewed(self._sent, snapshot.stamp)

    def failed(self) -> None:
        """The beat ended by an error; what the store has of it is not known."""
        self._counters.add("lease.failed")

    def rest(self, now: float) -> None:
        """The beat is over, well or not."""
        self.call_at = now + self.terms.heartbeat_s
