"""Mirrors handoffs and streams into the store, off the token path: whoever reports a change never waits for Redis."""

import asyncio
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from kv_transfer.counters import Counters
from kv_transfer.ownership import HandoffRecord, OwnershipStore, StoreUnavailable, Transition, TransitionResult
from kv_transfer.transfers import StateChange

_RETRY_S = 0.2
_TTL_S = 900.0  # beyond the longest request; ends what a dead worker left
_FLUSH_S = 2.0


@dataclass(frozen=True, slots=True)
class _StreamBegan:
    request_id: str


@dataclass(frozen=True, slots=True)
class _StreamEnded:
    request_id: str


_Change = HandoffRecord | Transition | _StreamBegan | _StreamEnded


class HandoffMirror:
    """A decode worker's mirror. Any thread may report; entered in the loop that owns the store, it applies in order.

    A change is tried again while Redis is away. At the bound the oldest is dropped. Refusals, unknown ids and drops are
    counted: they are alarms, and change nothing in the worker.
    """

    def __init__(self, store: OwnershipStore, *, decode: str, max_changes: int = 4096):
        self._store = store
        self._decode = decode  # incarnation
        self._max_changes = max_changes
        self._changes: deque[_Change] = deque()
        self._lock = threading.Lock()
        self._counts = Counters()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._some = asyncio.Event()
        self._none = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._apply_all(), name="handoff-mirror")
        return self

    async def __aexit__(self, *_: object) -> None:
        """What was reported is applied first, if Redis answers."""
        await self.flush(_FLUSH_S)
        assert self._task is not None, "entered before left"
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    @property
    def counters(self) -> dict[str, int]:
        return self._counts.read()

    def changed(self, change: StateChange) -> None:
        """A transfer's state change, as the receiver's `on_state` tells it."""
        transfer, previous = change.transfer, change.previous
        if previous is None:
            self._add(HandoffRecord(transfer.transfer_id, transfer.request_id, self._decode, attempt=transfer.attempt))
            return
        prefill = transfer.sender.hex() if transfer.sender else None
        self._add(Transition(transfer.transfer_id, previous, transfer.state, transfer.attempt, prefill))

    def stream_began(self, request_id: str) -> None:
        self._add(_StreamBegan(request_id))

    def stream_ended(self, request_id: str) -> None:
        self._add(_StreamEnded(request_id))

    async def flush(self, timeout_s: float) -> bool:
        """Waits until everything reported so far is applied. False if it was not in time. In the mirror's loop."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._changes:
                    self._none.clear()
                    self._some.set()
                    await self._none.wait()
        except TimeoutError:
            return False
        return True

    async def _apply_all(self) -> None:
        while True:
            while (change := self._first()) is not None:
                if await self._try(change):
                    self._remove(change)
                else:
                    await asyncio.sleep(_RETRY_S)
            self._none.set()
            await self._some.wait()
            self._some.clear()

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
            case HandoffRecord():
                return await self._store.begin_handoff(change, _TTL_S)
            case Transition():
                return await self._store.advance_handoff(change)
            case _StreamBegan(request_id):
                await self._store.put_stream(request_id, self._decode, _TTL_S)
            case _StreamEnded(request_id):
                await self._store.drop_stream(request_id, self._decode)
        return TransitionResult.APPLIED
