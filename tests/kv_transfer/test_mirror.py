"""The mirror never makes its reporters wait, keeps their order, and counts what the store would not take."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from isthmus.clock import SystemClock
from kv_transfer.ownership.changes import AdvanceHandoff, BeginHandoff, DropStream, PutStream
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.mirror_task import MirrorTask
from kv_transfer.ownership.store import (
    HandoffRecord,
    StoreRefused,
    StoreUnavailable,
    Transition,
    TransitionResult,
)
from tests.kv_transfer.test_ownership import D1, P1

RESERVED, FILLING, CLAIMED = HandoffState.RESERVED, HandoffState.FILLING, HandoffState.CLAIMED


class FlakyOwnership(MemoryOwnership):
    """A store that is away while `is_away`, and refuses the transfer `refused`."""

    is_away = False
    refused = ""

    async def begin_handoff(self, record: HandoffRecord, ttl_s: float) -> TransitionResult:
        if self.is_away:
            raise StoreUnavailable("away")
        if record.transfer_id == self.refused:
            raise StoreRefused("garbage")
        return await super().begin_handoff(record, ttl_s)


@pytest.fixture
def store() -> FlakyOwnership:
    return FlakyOwnership(SystemClock())


@pytest.fixture
async def mirror(store: FlakyOwnership) -> AsyncIterator[MirrorTask]:
    mirror = MirrorTask(store, SystemClock(), max_changes=50)
    task = asyncio.create_task(mirror.run())
    yield mirror
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def report(mirror: MirrorTask, transfer_id: str, *states: HandoffState) -> None:
    begin(mirror, transfer_id)
    before = RESERVED
    for state in states:
        advance(mirror, Transition(transfer_id, before, state, 1, P1))
        before = state


def begin(mirror: MirrorTask, transfer_id: str) -> None:
    mirror.report(BeginHandoff(HandoffRecord(transfer_id, "r", D1), 60))


def advance(mirror: MirrorTask, transition: Transition) -> None:
    mirror.report(AdvanceHandoff(transition))


async def test_changes_from_many_threads_arrive_in_the_order_of_each(mirror: MirrorTask, store: FlakyOwnership) -> None:
    threads = [threading.Thread(target=report, args=(mirror, f"t{number}", FILLING, CLAIMED)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mirror.report(PutStream("request", D1, 60))
    assert await mirror.flush(5)
    for number in range(10):
        record = await store.find_handoff(f"t{number}")
        assert record is not None
        assert (record.state, record.prefill) == (CLAIMED, P1)
    assert await store.streams.find("request") == D1
    mirror.report(DropStream("request", D1))
    assert await mirror.flush(5)
    assert await store.streams.find("request") is None
    assert mirror.counters == {}


async def test_what_was_reported_while_redis_was_away_follows(mirror: MirrorTask, store: FlakyOwnership) -> None:
    store.is_away = True
    report(mirror, "t", FILLING)
    assert not await mirror.flush(0.05)
    store.is_away = False
    assert await mirror.flush(5)
    record = await store.find_handoff("t")
    assert record is not None
    assert record.state is FILLING
    assert mirror.counters["mirror.unavailable"] >= 1


async def test_at_the_bound_the_oldest_change_is_dropped(mirror: MirrorTask, store: FlakyOwnership) -> None:
    store.is_away = True
    for number in range(80):
        begin(mirror, f"t{number}")
    assert mirror.counters["mirror.dropped"] == 30
    store.is_away = False
    assert await mirror.flush(5)
    assert await store.find_handoff("t0") is None
    assert await store.find_handoff("t79") is not None


async def test_refusals_and_unknown_ids_are_counted_alarms(mirror: MirrorTask) -> None:
    report(mirror, "t", FILLING)
    advance(mirror, Transition("t", RESERVED, HandoffState.RELEASED, 1))
    advance(mirror, Transition("never", RESERVED, FILLING, 1))
    assert await mirror.flush(5)
    assert mirror.counters == {"mirror.refused": 1, "mirror.unknown": 1}


async def test_a_change_that_fails_otherwise_is_dropped_and_counted(mirror: MirrorTask, store: FlakyOwnership) -> None:
    store.refused = "refused"
    begin(mirror, "refused")
    mirror.report(BeginHandoff(HandoffRecord("late", "r", D1), ttl_s="no number"))  # type: ignore[arg-type]
    begin(mirror, "t")
    assert await mirror.flush(5)
    assert await store.find_handoff("t") is not None
    assert mirror.counters == {"mirror.failed": 2}
