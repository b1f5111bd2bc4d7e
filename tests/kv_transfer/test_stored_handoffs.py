"""What Redis holds of a request's transfers, told as ledger events; and a process that starts before its store."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from isthmus.clock import SystemClock
from isthmus.config import RouterConfig, load
from isthmus.errors import CannotStart
from isthmus.process.admin import NOT_STORED, STORED_EVENT
from isthmus.testing.manual_clock import ManualClock
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.ownership.store import (
    START_WAIT_S,
    HandoffRecord,
    OwnershipStore,
    StoreUnavailable,
    connected,
)
from kv_transfer.ownership.stored_handoffs import StoredHandoffs
from tests.kv_transfer.test_ownership import D1, P1
from tests.kv_transfer.virtual_store import VirtualStore, at_once

RECORD = HandoffRecord("t1", "request", D1, P1, 3, HandoffState.FILLING)


class RunningClock(ManualClock):
    """Time passes where somebody sleeps; a limit is over when it was passed."""

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    @asynccontextmanager
    async def timeout(self, seconds: float | None) -> AsyncIterator[None]:
        until = self.now() + (seconds or 0.0)
        yield
        if seconds is not None and self.now() > until:
            raise TimeoutError


class TroubledStore(VirtualStore):
    """Away for `num_refusals` calls, and then again from the transfer `away_from` on."""

    num_refusals = 0
    away_from = ""

    async def ping(self) -> None:
        if self.num_refusals:
            self.num_refusals -= 1
            raise StoreUnavailable("away")

    async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
        if transfer_id == self.away_from:
            raise StoreUnavailable("away")
        return await super().find_handoff(transfer_id)


def test_each_transfer_is_told_as_the_store_holds_it() -> None:
    store = TroubledStore()
    at_once(store.begin_handoff(RECORD, 60))
    store.keys.handoffs.put("bad", {b"state": b"FILLING", b"attempt": b"many"}, 60)
    found = at_once(StoredHandoffs(store, RunningClock()).read("request", ["t1", "none", "bad"]))
    assert {(event.sequence, event.event, event.request_id) for event in found} == {(0, STORED_EVENT, "request")}
    assert [(event.transfer_id, event.cause, event.attempt) for event in found] == [
        ("t1", "", 3),
        ("none", NOT_STORED, 0),
        ("bad", NOT_STORED, 0),
    ]
    assert found[0].fields == {"state": "FILLING", "decode": D1, "prefill": P1}
    assert store.counters == {"bad_record.handoff": 1}


def test_a_store_that_goes_away_in_between_is_said_to_be_away() -> None:
    store = TroubledStore()
    store.away_from = "t2"
    at_once(store.begin_handoff(RECORD, 60))
    found = at_once(StoredHandoffs(store, RunningClock()).read("request", ["t1", "t2", "t3"]))
    assert [event.cause for event in found] == ["", "STORE_UNAVAILABLE", "STORE_UNAVAILABLE"]


async def test_a_store_that_is_silent_costs_a_bounded_time() -> None:
    class SilentStore(TroubledStore):
        async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
            await SystemClock().sleep(60)
            return None

    found = await StoredHandoffs(SilentStore(), SystemClock()).read("request", ["t1", "t2"])
    assert [event.cause for event in found] == ["STORE_UNAVAILABLE"] * 2


async def test_a_process_waits_for_a_store_that_starts() -> None:
    clock = RunningClock()
    store = TroubledStore()
    store.num_refusals = 3
    async with connected(lambda _: store, load(RouterConfig, [], {}), clock) as opened:
        assert opened is store
    assert 0 < clock.now() - 1000.0 < START_WAIT_S


async def test_a_process_does_not_wait_for_ever() -> None:
    clock = RunningClock()
    store = TroubledStore()
    store.num_refusals = 10**6

    def open_store(_: str) -> OwnershipStore:
        return store

    with pytest.raises(CannotStart, match="does not answer"):
        async with connected(open_store, load(RouterConfig, [], {}), clock):
            pass
    assert START_WAIT_S <= clock.now() - 1000.0 < START_WAIT_S + 1
