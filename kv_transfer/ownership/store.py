"""Who is alive and who owns which blocks: discovery, placement hints and Resume look-up. Never a fence.

The process that owns memory decides by itself; a store may be flushed, rolled back, slow, gone or lying. Redis and its
in-memory twin (`kv_transfer/ownership/memory.py`) obey one suite.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from isthmus.clock import LoopClock
from isthmus.config import ServiceConfig
from isthmus.errors import CannotStart, IsthmusError
from isthmus.kv.layout import KvLayout
from isthmus.types import BlockCounts
from kv_transfer.counters import Counters
from kv_transfer.ownership.handoff import HandoffState

START_WAIT_S = 4.0  # for a Redis that starts, or stands still, as this process does
START_POLL_S = 0.2
BLOCK_HASH_BYTES = 16
MAX_BLOCK_HASHES = 65_536  # of one worker's snapshot: 1 MiB
SEQUENCE_BYTES = 8  # ahead of the hashes


class StoreUnavailable(IsthmusError):
    """The store did not answer in time; nothing is known about whether the change was made."""

    grpc_status = "UNAVAILABLE"
    reason = "STORE_UNAVAILABLE"
    http_status = 503


class StoreRefused(StoreUnavailable):
    """The store answered that it cannot do this, e.g. with what a stranger wrote under the key. No use to try again."""

    reason = "STORE_REFUSED"


class TransitionResult(Enum):
    """What a transition script returns, by its code."""

    REFUSED = 0  # the record is in another state, or of a higher attempt: a counted alarm
    APPLIED = 1  # made now, or found made already by the same attempt
    UNKNOWN = 2  # no record: it ended, expired, or the store lost it


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    blocks: BlockCounts
    num_streams: int = 0
    num_queued: int = 0


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A worker's lease: who it is, where it is, how loaded it is."""

    incarnation: str  # 32 hex digits
    role: str  # prefill | decode
    name: str
    pid: int
    grpc_address: str
    zmq_endpoint: str | None  # decode workers receive blocks here
    http_address: str
    layout: KvLayout
    numerics_digest: str
    numerics_ingredients: dict[str, str]
    model_digest: str
    load: WorkerLoad
    serving: bool
    state: str  # as in GetStatus: starting | idle | stepping | stalled | draining | not_ready
    seconds_since_progress: float
    renewal: int = 0  # of the lease; tells what was written last from what was written before


@dataclass(frozen=True, slots=True)
class HandoffRecord:
    transfer_id: str
    request_id: str
    decode: str  # incarnation of the worker that set the blocks aside
    prefill: str | None = None  # incarnation of the worker that fills them, once known
    attempt: int = 1
    state: HandoffState = HandoffState.RESERVED


@dataclass(frozen=True, slots=True)
class Transition:
    """`state` may equal `from_state` for a rearm, which only raises the attempt."""

    transfer_id: str
    from_state: HandoffState
    to_state: HandoffState
    attempt: int
    prefill: str | None = None  # recorded when known


@dataclass(frozen=True, slots=True)
class BlockSnapshot:
    """Every full prompt block a worker can serve from its cache."""

    sequence: int  # grows with every change
    hashes: Sequence[bytes] = field(default=())  # BLOCK_HASH_BYTES each

    @property
    def stamp(self) -> "Stamp":
        return self.sequence, SEQUENCE_BYTES + BLOCK_HASH_BYTES * len(self.hashes)


Stamp = tuple[int, int]  # a stored snapshot's sequence and bytes, which tell it from others; zeros: none is stored


@dataclass(frozen=True, slots=True)
class Renewed:
    """What the store held of a worker until this renewal. Other than what was written last: it lost or changed data."""

    record: WorkerRecord | None  # None: nothing, or nothing that makes sense
    blocks: Stamp


class BlockIndex(Protocol):
    """What each worker's cache holds. It is read by the cluster-wide prefix cache, which comes later."""

    async def publish(self, incarnation: str, snapshot: BlockSnapshot, ttl_s: float) -> None:
        """Replaces whatever is there: only the worker itself writes its snapshot."""
        ...

    async def find(self, incarnation: str) -> BlockSnapshot | None: ...


class StreamHints(Protocol):
    """Which decode worker holds a stream: where Resume looks first."""

    async def put(self, request_id: str, decode: str, ttl_s: float) -> None: ...

    async def drop(self, request_id: str, decode: str) -> bool:
        """Only if the hint still names `decode`: a zombie must not hide its successor."""
        ...

    async def find(self, request_id: str) -> str | None: ...


class OwnershipStore(Protocol):
    """Every call is bounded in time and raises StoreUnavailable; values that make no sense are skipped and counted.

    An owner repairs what it owns by saying it again: put_worker, blocks.publish, begin_handoff and streams.put replace
    values of any type, and may be repeated at will.
    """

    counters: Counters

    @property
    def blocks(self) -> BlockIndex: ...

    @property
    def streams(self) -> StreamHints: ...

    async def put_worker(self, record: WorkerRecord, ttl_s: float) -> Renewed:
        """Takes or renews the lease, and with it the life of the worker's block snapshot. Returns what was there."""
        ...

    async def drop_worker(self, incarnation: str) -> None: ...

    async def list_workers(self) -> list[WorkerRecord]: ...

    async def begin_handoff(self, record: HandoffRecord, ttl_s: float) -> TransitionResult:
        """Records the handoff as its decode worker says it is, in any state: a new one, or one to assert again.

        REFUSED if a record of another decode worker or of a higher attempt is there.
        """
        ...

    async def advance_handoff(self, transition: Transition) -> TransitionResult:
        """One atomic step of handoff.TRANSITIONS; a final state deletes the record."""
        ...

    async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
        """The record as it is stored now. For people to look at: no worker acts on it."""
        ...

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


OpenStore = Callable[[str], OwnershipStore]  # by URL; it connects at its first command


@asynccontextmanager
async def connected(open_store: OpenStore, config: ServiceConfig, clock: LoopClock) -> AsyncIterator[OwnershipStore]:
    """A store that answered once. Raises CannotStart when it does not for START_WAIT_S."""
    store = open_store(config.redis_url)
    give_up_at = clock.now() + START_WAIT_S
    try:
        while not await _answers(store):
            if clock.now() >= give_up_at:
                problem = f"Redis at {config.redis_shown} does not answer"
                raise CannotStart("redis_url", problem, "start Redis there, or set --redis-url or ISTHMUS_REDIS_URL")
            await clock.sleep(START_POLL_S)
        yield store
    finally:
        await store.close()


async def _answers(store: OwnershipStore) -> bool:
    try:
        await store.ping()
    except StoreUnavailable:
        return False
    return True
