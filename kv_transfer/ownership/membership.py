"""A worker's place among the others: its leased record, and whether its cache layout fits theirs.

The first worker that serves decides the layout. One that differs stays not-ready, naming the field, until the others
are gone. A driver (`membership_task.py`) asks the store and carries out the verdict.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from isthmus.kv.layout import KvLayout
from isthmus.process.admin import Identity
from isthmus.process.health import Health
from isthmus.types import BlockCounts
from isthmus.v1 import admin_pb2
from kv_transfer.ownership.store import MAX_BLOCK_HASHES, BlockSnapshot, WorkerLoad, WorkerRecord

NOT_REGISTERED = "not registered in Redis yet"
LOOK_AGAIN_S = 0.05


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the worker may serve now. `waits_for` says why not; None: it may."""

    waits_for: str | None
    is_news: bool  # not what the verdict before said


class Joining:
    """Whether a worker may serve yet. Its driver is the one caller of its methods."""

    def __init__(self, layout: KvLayout, incarnation: str):
        self.call_at: float | None = float("-inf")  # when to look at the others; None: no more, it serves
        self._layout = layout
        self._incarnation = incarnation
        self._waits_for: str | None = None

    def judge(self, others: Sequence[WorkerRecord], *, is_registered: bool, now: float) -> Verdict:
        """`others` is every worker that the store lists, perhaps this one too.

        `is_registered`: the store has confirmed this worker's lease.
        """
        conflict = find_conflict(self._layout, self._incarnation, others)
        waits_for = conflict or (None if is_registered else NOT_REGISTERED)
        is_news = waits_for != self._waits_for
        self._waits_for = waits_for
        self.call_at = None if waits_for is None else now + LOOK_AGAIN_S
        return Verdict(waits_for, is_news)

    def not_answered(self, now: float) -> None:
        """The store could not be asked; nothing changes."""
        self.call_at = now + LOOK_AGAIN_S


def find_conflict(layout: KvLayout, incarnation: str, others: Sequence[WorkerRecord]) -> str | None:
    """How this layout differs from that of another worker that serves, for a person to read; None when it fits."""
    for other in others:
        if other.serving and other.incarnation != incarnation and other.layout.fingerprint != layout.fingerprint:
            differences = "; ".join(layout.differing_fields(other.layout))
            return f"cache layout differs from that of {other.name}: {differences}"
    return None


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One look at a worker: what its record in the store is made of."""

    identity: Identity
    pid: int
    layout: KvLayout
    status: admin_pb2.GetStatusResponse  # the worker's own part: blocks, streams, numerics
    health: Health
    seconds_since_progress: float


def worker_record(facts: WorkerFacts) -> WorkerRecord:
    """The worker's record, without the renewal's number."""
    status = facts.status
    blocks = status.blocks
    who_and_where: dict[str, Any] = {**asdict(facts.identity), "zmq_endpoint": facts.identity.zmq_endpoint or None}
    return WorkerRecord(
        **who_and_where,
        pid=facts.pid,
        layout=facts.layout,
        numerics_digest=status.numerics_digest,
        numerics_ingredients=dict(status.numerics_ingredients),
        model_digest=facts.layout.model_digest,
        load=WorkerLoad(
            blocks=BlockCounts(blocks.total, blocks.free, blocks.cached, blocks.referenced, blocks.draining),
            num_streams=status.num_streams,
            num_queued=status.num_queued,
        ),
        serving=facts.health.serving,
        state=facts.health.state.value,
        seconds_since_progress=facts.seconds_since_progress,
    )


def newest_blocks(num_changes: int, hashes: Sequence[bytes]) -> BlockSnapshot:
    """What of a cache is shown to others: the newest contents, as many as a snapshot holds."""
    return BlockSnapshot(num_changes, hashes[-MAX_BLOCK_HASHES:])
