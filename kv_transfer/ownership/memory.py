"""The in-memory twin of the Redis store: the same answers within one process."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

from isthmus.clock import Clock, SystemClock
from kv_transfer.counters import Counters
from kv_transfer.ownership.handoff import is_allowed
from kv_transfer.ownership.records import (
    decode_blocks,
    decode_stamp,
    decode_worker,
    encode_blocks,
    encode_worker,
    read_record,
    read_workers,
)
from kv_transfer.ownership.store import (
    BlockSnapshot,
    HandoffRecord,
    Renewed,
    Transition,
    TransitionResult,
    WorkerRecord,
)

Value = TypeVar("Value")


@dataclass(slots=True)
class _Entry(Generic[Value]):
    value: Value
    ttl_s: float
    expires_at: float


class Expiring(Generic[Value]):
    """A dictionary whose entries end at their time, as Redis keys do."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._entries: dict[str, _Entry[Value]] = {}

    def put(self, name: str, value: Value, ttl_s: float | None = None) -> None:
        """Without `ttl_s` the entry keeps its time to live, counted anew."""
        ttl_s = self._entries[name].ttl_s if ttl_s is None else ttl_s
        self._entries[name] = _Entry(value, ttl_s, self._clock.now() + ttl_s)

    def renew(self, name: str, ttl_s: float) -> None:
        if (value := self.get(name)) is not None:
            self.put(name, value, ttl_s)

    def get(self, name: str) -> Value | None:
        return dict(self.items()).get(name)

    def drop(self, name: str) -> None:
        self._entries.pop(name, None)

    def items(self) -> list[tuple[str, Value]]:
        now = self._clock.now()
        self._entries = {name: entry for name, entry in self._entries.items() if entry.expires_at > now}
        return [(name, entry.value) for name, entry in self._entries.items()]


class MemoryBlocks:
    """BlockIndex. `raw` is open so that tests can plant what a hostile writer would."""

    def __init__(self, clock: Clock, counters: Counters):
        self.raw: Expiring[bytes] = Expiring(clock)
        self._counters = counters

    async def publish(self, incarnation: str, snapshot: BlockSnapshot, ttl_s: float) -> None:
        self.raw.put(incarnation, encode_blocks(snapshot), ttl_s)

    async def find(self, incarnation: str) -> BlockSnapshot | None:
        return read_record("blocks", decode_blocks, self.raw.get(incarnation), self._counters)


class MemoryStreams:
    """StreamHints."""

    def __init__(self, clock: Clock):
        self._streams: Expiring[str] = Expiring(clock)

    async def put(self, request_id: str, decode: str, ttl_s: float) -> None:
        self._streams.put(request_id, decode, ttl_s)

    async def drop(self, request_id: str, decode: str) -> bool:
        if self._streams.get(request_id) != decode:
            return False
        self._streams.drop(request_id)
        return True

    async def find(self, request_id: str) -> str | None:
        return self._streams.get(request_id)


class MemoryOwnership:
    """Single-threaded, like one event loop. Keeps leases and blocks encoded, so that the codec is exercised too."""

    def __init__(self, clock: Clock | None = None):
        clock = clock or SystemClock()
        self.counters = Counters()
        self.workers: Expiring[bytes] = Expiring(clock)  # open for tests, as above
        self.blocks = MemoryBlocks(clock, self.counters)
        self.streams = MemoryStreams(clock)
        self._handoffs: Expiring[HandoffRecord] = Expiring(clock)

    async def put_worker(self, record: WorkerRecord, ttl_s: float) -> Renewed:
        name = record.incarnation
        known, blocks = self.workers.get(name), self.blocks.raw.get(name) or b""
        self.workers.put(name, encode_worker(record), ttl_s)
        self.blocks.raw.renew(name, ttl_s)
        decode = partial(decode_worker, incarnation=name)
        return Renewed(read_record("worker", decode, known, self.counters), decode_stamp(blocks, len(blocks)))

    async def drop_worker(self, incarnation: str) -> None:
        self.workers.drop(incarnation)
        self.blocks.raw.drop(incarnation)

    async def list_workers(self) -> list[WorkerRecord]:
        return read_workers(self.workers.items(), self.counters)

    async def begin_handoff(self, record: HandoffRecord, ttl_s: float) -> TransitionResult:
        known = self._handoffs.get(record.transfer_id)
        if known is not None and (known.decode != record.decode or known.attempt > record.attempt):
            return TransitionResult.REFUSED
        self._handoffs.put(record.transfer_id, record, ttl_s)
        return TransitionResult.APPLIED

    async def advance_handoff(self, transition: Transition) -> TransitionResult:
        known = self._handoffs.get(transition.transfer_id)
        if known is None:
            return TransitionResult.UNKNOWN
        if not _may(known, transition):
            return TransitionResult.REFUSED
        if transition.to_state.is_final:
            self._handoffs.drop(transition.transfer_id)
        else:
            prefill = transition.prefill or known.prefill
            after = replace(known, state=transition.to_state, attempt=transition.attempt, prefill=prefill)
            self._handoffs.put(transition.transfer_id, after)
        return TransitionResult.APPLIED

    async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
        return self._handoffs.get(transfer_id)

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


def _may(known: HandoffRecord, wanted: Transition) -> bool:
    """The rule of advance_handoff.lua."""
    if wanted.attempt < known.attempt:
        return False
    is_repeated = known.state is wanted.to_state and wanted.attempt == known.attempt
    is_rearm = known.state is wanted.from_state is wanted.to_state and wanted.attempt > known.attempt
    allowed = known.state is wanted.from_state and is_allowed(known.state, wanted.to_state)
    return is_repeated or is_rearm or allowed
