"""The in-memory twin of the Redis store: the same answers within one process."""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from isthmus.clock import Clock, SystemClock
from kv_transfer.counters import Counters
from kv_transfer.handoff import is_allowed
from kv_transfer.ownership import BlockSnapshot, HandoffRecord, Transition, TransitionResult, WorkerRecord
from kv_transfer.records import BadRecord, decode_blocks, decode_worker, encode_blocks, encode_worker

Value = TypeVar("Value")


@dataclass(slots=True)
class _Entry(Generic[Value]):
    value: Value
    ttl_s: float
    expires_at: float


class _Expiring(Generic[Value]):
    """A dictionary whose entries end at their time, as Redis keys do."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._entries: dict[str, _Entry[Value]] = {}

    def put(self, name: str, value: Value, ttl_s: float) -> None:
        self._entries[name] = _Entry(value, ttl_s, self._clock.now() + ttl_s)

    def update(self, name: str, value: Value) -> None:
        """New value, time to live counted anew."""
        self.put(name, value, self._entries[name].ttl_s)

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


class MemoryOwnership:
    """Single-threaded, like one event loop. Stores the same encoded values, so that the codec is exercised too."""

    def __init__(self, clock: Clock | None = None):
        clock = clock or SystemClock()
        self._counts = Counters()
        self.workers: _Expiring[bytes] = _Expiring(clock)  # public so that tests can plant what a hostile writer would
        self.blocks: _Expiring[bytes] = _Expiring(clock)
        self._handoffs: _Expiring[HandoffRecord] = _Expiring(clock)
        self._streams: _Expiring[str] = _Expiring(clock)

    @property
    def counters(self) -> dict[str, int]:
        return self._counts.read()

    async def put_worker(self, record: WorkerRecord, ttl_s: float) -> None:
        self.workers.put(record.incarnation, encode_worker(record), ttl_s)
        self.blocks.renew(record.incarnation, ttl_s)

    async def drop_worker(self, incarnation: str) -> None:
        self.workers.drop(incarnation)
        self.blocks.drop(incarnation)

    async def list_workers(self) -> list[WorkerRecord]:
        records: list[WorkerRecord] = []
        for incarnation, raw in self.workers.items():
            try:
                records.append(decode_worker(raw, incarnation))
            except BadRecord:
                self._counts.add("bad_record.worker")
        return records

    async def publish_blocks(self, incarnation: str, snapshot: BlockSnapshot, ttl_s: float) -> bool:
        raw = encode_blocks(snapshot)
        known = await self.list_blocks(incarnation)
        if known is not None and known.sequence >= snapshot.sequence:
            return False
        self.blocks.put(incarnation, raw, ttl_s)
        return True

    async def list_blocks(self, incarnation: str) -> BlockSnapshot | None:
        raw = self.blocks.get(incarnation)
        try:
            return None if raw is None else decode_blocks(raw)
        except BadRecord:
            self._counts.add("bad_record.blocks")
            return None

    async def begin_handoff(self, record: HandoffRecord, ttl_s: float) -> TransitionResult:
        known = self._handoffs.get(record.transfer_id)
        if known is not None and replace(known, prefill=record.prefill) != record:
            return TransitionResult.REFUSED
        self._handoffs.put(record.transfer_id, known or record, ttl_s)
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
            self._handoffs.update(transition.transfer_id, after)
        return TransitionResult.APPLIED

    async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
        return self._handoffs.get(transfer_id)

    async def put_stream(self, request_id: str, decode: str, ttl_s: float) -> None:
        self._streams.put(request_id, decode, ttl_s)

    async def drop_stream(self, request_id: str, decode: str) -> bool:
        if self._streams.get(request_id) != decode:
            return False
        self._streams.drop(request_id)
        return True

    async def find_stream(self, request_id: str) -> str | None:
        return self._streams.get(request_id)

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
