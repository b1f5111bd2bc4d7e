"""Mirrors handoffs and streams into the store, off the token path: whoever reports a change never waits for Redis."""

import asyncio
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from kv_transfer.counters import Counters
from kv_transfer.ownership import HandoffRecord, OwnershipStore, StoreUnavailable, Transition, TransitionResult

_RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class _Begin:
    record: HandoffRecord
    ttl_s: float


@dataclass(frozen=True, slots=True)
class _PutStream:
    request_id: str
    decode: str
    ttl_s: float


@dataclass(frozen=True, slots=True)
class _DropStream:
    request_id: str
    decode: str


_Change = _Begin | Transition | _PutStream | _DropStream


class HandoffMirror:
    """Any thread may report; `run` is a task of the loop that owns the store and applies in order.

    A change is tried again while Redis is away. At the bound the oldest is dropped. Refusals, unknown ids and drops are
    counted: they are alarms, and change nothing in the worker.
    """

    def __init__(self, store: OwnershipStore, *, max_changes: int = 4096):
        self._store = store
        self._max_changes = max_changes
        self._changes: deque[_Change] = deque()
        self._lock = threading.Lock()
        self._counts = Counters()
        self._loop: asyncio.AbstractEventLoop | None = None  # None: not running yet
        self._some = asyncio.Event()
        self._none = asyncio.Event()

    @property
    def counters(self) -> dict[str, int]:
        return self._counts.read()

    def begin_handoff(self, record: HandoffRecord, ttl_s: float) -> None:
        self._add(_Begin(record, ttl_s))

    def advance_handoff(self, transition: Transition) -> None:
        self._add(transition)

    def put_stream(self, request_id: str, decode: str, ttl_s: float) -> None:
        self._add(_PutStream(request_id, decode, ttl_s))

    def drop_stream(self, request_id: str, decode: str) -> None:
        self._add(_DropStream(request_id, decode))

    async def run(self) -> None:
        """Until cancelled."""
        self._loop = asyncio.get_running_loop()
        while True:
            while (change := self._first()) is not None:
                if await self._try(change):
                    self._remove(change)
                else:
                    await asyncio.sleep(_RETRY_S)
            self._none.set()
            await self._some.wait()
            self._some.clear()

    async def flush(self, timeout_s: float) -> bool:
        """Waits until everything reported so far is applied. False if it was not in time. In the loop of `run`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._first() is not None:
                    self._none.clear()
                    self._some.set()
                    await self._none.wait()
        except TimeoutError:
            return False
        return True

    def _add(self, change: _Change) -> None:
        with self._lock:
            self._changes.append(change)
            if len(self._changes) > self._max_changes:
                self._changes.popleft()
                self._counts.add("mirror.dropped")
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(self._some.set)

    def _first(self) -> _Change | None:
        with self._lock:
            return self._changes[0] if self._changes else None

    def _remove(self, change: _Change) -> None:
        """The applied change, unless the bound has dropped it meanwhile."""
        with self._lock:
            if self._changes and self._changes[0] is change:
                self._changes.popleft()

    async def _try(self, change: _Change) -> bool:
        try:
            result = await self._apply(change)
        except StoreUnavailable:
            self._counts.add("mirror.unavailable")
            return False
        if result is TransitionResult.REFUSED:
            self._counts.add("mirror.refused")
        elif result is TransitionResult.UNKNOWN:
            self._counts.add("mirror.unknown")
        return True

    async def _apply(self, change: _Change) -> TransitionResult:
        match change:
            case _Begin(record, ttl_s):
                return await self._store.begin_handoff(record, ttl_s)
            case Transition():
                return await self._store.advance_handoff(change)
            case _PutStream(request_id, decode, ttl_s):
                await self._store.streams.put(request_id, decode, ttl_s)
            case _DropStream(request_id, decode):
                await self._store.streams.drop(request_id, decode)
        return TransitionResult.APPLIED
