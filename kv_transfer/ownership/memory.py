"""The in-memory twin of the Redis store: the same answers within one process, by a clock that is handed in.

No call waits: a coroutine of this store ends at its first step, so tests and a simulator need no event loop for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from isthmus.clock import Clock
from kv_transfer.counters import Counters
from kv_transfer.ownership.handoff import HandoffState, is_allowed
from kv_transfer.ownership.records import (
    decode_blocks,
    decode_handoff,
    decode_stamp,
    decode_stream,
    decode_worker,
    encode_blocks,
    encode_handoff,
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


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Value]):
    value: Value
    ttl_s: float
    expires_at: float


class Expiring(Generic[Value]):
    """A dictionary whose entries end at their time, as Redis keys do. Whoever holds it may write."""

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
        entry = self._entries.get(name)
        if entry is None:
            return None
        if entry.expires_at <= self._clock.now():
            del self._entries[name]
            return None
        return entry.value

    def drop(self, name: str) -> None:
        self._entries.pop(name, None)

    def items(self) -> list[tuple[str, Value]]:
        now = self._clock.now()
        self._entries = {name: entry for name, entry in self._entries.items() if entry.expires_at > now}
        return [(name, entry.value) for name, entry in self._entries.items()]

    def copy(self) -> "Expiring[Value]":
        """The entries of this moment; each ends when it would have ended here."""
        copied: Expiring[Value] = Expiring(self._clock)
        copied._entries = dict(self._entries)
        return copied


@dataclass(slots=True)
class MemoryKeys:
    """What Redis would hold, as bytes, by kind of key and name. Tests plant here what a hostile writer would.

    A copy that takes the place of the keys is a rollback, and new ones are a flush.
    """

    workers: Expiring[bytes]
    blocks: Expiring[bytes]
    handoffs: Expiring[Mapping[bytes, bytes]]
    streams: Expiring[bytes]

    @classmethod
    def empty(cls, clock: Clock) -> "MemoryKeys":
        return cls(Expiring(clock), Expiring(clock), Expiring(clock), Expiring(clock))

    def copy(self) -> "MemoryKeys":
        return MemoryKeys(self.workers.copy(), self.blocks.copy(), self.handoffs.copy(), self.streams.copy())


class MemoryOwnership:
    """OwnershipStore. Any number of routers and workers of one thread may share it.

    `keys` may be replaced at any time, as a Redis that loses what it knew.
    """

    def __init__(self, clock: Clock):
        self.counters = Counters()
        self.keys = MemoryKeys.empty(clock)
        self.blocks = MemoryBlocks(self)
        self.streams = MemoryStreams(self)

    async def put_worker(self, record: WorkerRecord, ttl_s: float) -> Renewed:
        name = record.incarnation
        known = self.keys.workers.get(name)
        blocks = self.keys.blocks.get(name) or b""
        self.keys.workers.put(name, encode_worker(record), ttl_s)
        self.keys.blocks.renew(name, ttl_s)
        decode = partial(decode_worker, incarnation=name)
        return Renewed(read_record("worker", decode, known, self.counters), decode_stamp(blocks, len(blocks)))

    async def drop_worker(self, incarnation: str) -> None:
        self.keys.workers.drop(incarnation)
        self.keys.blocks.drop(incarnation)

    async def list_workers(self) -> list[WorkerRecord]:
        return read_workers(self.keys.workers.items(), self.counters)

    async def begin_handoff(self, record: HandoffRecord, ttl_s: float) -> TransitionResult:
        known = self.keys.handoffs.get(record.transfer_id) or {}
        decode = known.get(b"decode")
        attempt = _number(known.get(b"attempt"))
        if decode is None or attempt is None:
            is_taken = False
        else:
            is_taken = decode != record.decode.encode() or attempt > record.attempt
        if is_taken:
            return TransitionResult.REFUSED
        self.keys.handoffs.put(record.transfer_id, encode_handoff(record), ttl_s)
        return TransitionResult.APPLIED

    async def advance_handoff(self, transition: Transition) -> TransitionResult:
        known = self.keys.handoffs.get(transition.transfer_id) or {}
        state = known.get(b"state")
        if state is None:
            return TransitionResult.UNKNOWN
        if not _may(state, _number(known.get(b"attempt")), transition):
            return TransitionResult.REFUSED
        if transition.to_state.is_final:
            self.keys.handoffs.drop(transition.transfer_id)
            return TransitionResult.APPLIED
        after = {**known, b"state": _bytes(transition.to_state), b"attempt": b"%d" % transition.attempt}
        if transition.prefill is not None:
            after[b"prefill"] = transition.prefill.encode()
        self.keys.handoffs.put(transition.transfer_id, after)
        return TransitionResult.APPLIED

    async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
        decode = partial(decode_handoff, transfer_id=transfer_id)
        return read_record("handoff", decode, self.keys.handoffs.get(transfer_id), self.counters)

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


class MemoryBlocks:
    """BlockIndex."""

    def __init__(self, store: MemoryOwnership):
        self._store = store

    async def publish(self, incarnation: str, snapshot: BlockSnapshot, ttl_s: float) -> None:
        self._store.keys.blocks.put(incarnation, encode_blocks(snapshot), ttl_s)

    async def find(self, incarnation: str) -> BlockSnapshot | None:
        raw = self._store.keys.blocks.get(incarnation)
        return read_record("blocks", decode_blocks, raw, self._store.counters)


class MemoryStreams:
    """StreamHints."""

    def __init__(self, store: MemoryOwnership):
        self._store = store

    async def put(self, request_id: str, decode: str, ttl_s: float) -> None:
        self._store.keys.streams.put(request_id, decode.encode(), ttl_s)

    async def drop(self, request_id: str, decode: str) -> bool:
        if self._store.keys.streams.get(request_id) != decode.encode():
            return False
        self._store.keys.streams.drop(request_id)
        return True

    async def find(self, request_id: str) -> str | None:
        raw = self._store.keys.streams.get(request_id)
        return read_record("stream", decode_stream, raw, self._store.counters)


def _may(state: bytes, attempt: float | None, wanted: Transition) -> bool:
    """The rule of advance_handoff.lua, for a record of this state and attempt."""
    if attempt is None or wanted.attempt < attempt:
        return False
    before = _bytes(wanted.from_state)
    after = _bytes(wanted.to_state)
    is_repeated = state == after and wanted.attempt == attempt
    is_rearmed = state == before == after and wanted.attempt > attempt
    return is_repeated or is_rearmed or (state == before and is_allowed(wanted.from_state, wanted.to_state))


def _bytes(state: HandoffState) -> bytes:
    return state.value.encode()


def _number(raw: bytes | None) -> float | None:
    """As Lua reads it."""
    try:
        return None if raw is None else float(raw)
    except ValueError:
        return None
