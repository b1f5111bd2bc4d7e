"""The lease's core in virtual time: what a beat writes, and what it makes of a store that forgets, lies or is away."""

from dataclasses import replace

import pytest

from isthmus.errors import IsthmusError
from kv_transfer.counters import Counters
from kv_transfer.ownership.leases import Lease, LeaseTerms
from kv_transfer.ownership.store import BlockSnapshot, StoreUnavailable
from tests.kv_transfer.test_ownership import D1, P1, WORKER
from tests.kv_transfer.virtual_store import VirtualStore, at_once

TERMS = LeaseTerms(heartbeat_s=1.0, ttl_s=3.0)
BLOCKS = BlockSnapshot(1, (b"a" * 16,))


class Holder:
    """A worker that beats when it is due, and the store it writes to."""

    def __init__(self) -> None:
        self.store = VirtualStore()
        self.counters = Counters()
        self.lease = Lease(TERMS, self.counters)
        self.record = WORKER
        self.snapshot = BLOCKS
        self.num_published = 0

    def beat(self, *, is_away: bool = False, answer_is_lost: bool = False) -> bool:
        """Returns whether the store had lost something. The next beat's time comes first."""
        now = max(self.store.clock.now(), self.lease.call_at)
        self.store.clock.advance(now - self.store.clock.now())
        try:
            return self._write(is_away, answer_is_lost)
        except IsthmusError:
            self.lease.failed()
            return False
        finally:
            self.lease.rest(now)

    def _write(self, is_away: bool, answer_is_lost: bool) -> bool:
        record = self.lease.begin(self.record)
        if is_away:
            raise StoreUnavailable("away")
        found = at_once(self.store.put_worker(record, TERMS.ttl_s))
        if answer_is_lost:
            raise StoreUnavailable("away")
        is_lost = self.lease.renewed(found, self.store.clock.now())
        if self.lease.must_publish(self.snapshot):
            at_once(self.store.blocks.publish(record.incarnation, self.snapshot, TERMS.ttl_s))
            self.lease.published(self.snapshot)
            self.num_published += 1
        return is_lost

    def is_right(self) -> bool:
        listed = [replace(record, renewal=0) for record in at_once(self.store.list_workers())]
        return listed == [self.record] and at_once(self.store.blocks.find(D1)) == self.snapshot


@pytest.fixture
def holder() -> Holder:
    made = Holder()
    assert made.lease.last_ok is None
    assert not made.beat(), "the first beat expects nothing"
    assert made.is_right()
    return made


def test_beats_follow_one_another_by_the_heartbeat(holder: Holder) -> None:
    for _ in range(5):
        before = holder.store.clock.now()
        assert not holder.beat()
        assert holder.store.clock.now() == holder.lease.last_ok == before + TERMS.heartbeat_s
    assert holder.is_right()
    assert holder.num_published == 1
    assert holder.counters == {"lease.renewed": 6}


def test_what_changed_is_published_and_is_no_loss(holder: Holder) -> None:
    holder.snapshot = BlockSnapshot(2, (b"a" * 16, b"b" * 16))
    holder.record = replace(WORKER, state="stepping")
    assert not holder.beat()
    assert holder.is_right()
    assert not holder.beat()
    assert holder.num_published == 2


def test_a_flushed_store_is_noticed_once_and_told_again(holder: Holder) -> None:
    holder.store.flush()
    assert holder.beat()
    assert holder.is_right()
    assert not holder.beat()
    assert holder.counters["lease.store_lost"] == 1


def test_a_store_that_lost_the_blocks_only_is_noticed(holder: Holder) -> None:
    holder.store.keys.blocks.drop(D1)
    assert holder.beat()
    assert holder.is_right()


def test_a_rollback_is_noticed_although_nothing_but_the_renewal_differs(holder: Holder) -> None:
    older = holder.store.keys.copy()
    assert not holder.beat()
    holder.store.keys = older
    assert holder.beat()
    assert holder.is_right()
    assert not holder.beat()


@pytest.mark.parametrize(
    "lie", [b"", b"{}", b"\x80\x04\x95.", b"x" * 100_000], ids=["empty", "json", "binary", "too long"]
)
def test_a_record_that_somebody_overwrote_is_noticed(holder: Holder, lie: bytes) -> None:
    holder.store.keys.workers.put(D1, lie, 60)
    assert holder.beat()
    holder.store.keys.blocks.put(D1, lie, 60)
    assert holder.beat()
    assert holder.is_right()
    assert holder.counters["lease.store_lost"] == 2


def test_what_others_have_in_the_store_is_no_concern(holder: Holder) -> None:
    at_once(holder.store.put_worker(replace(WORKER, incarnation=P1, role="prefill"), 60))
    assert not holder.beat()


def test_a_store_that_is_away_takes_the_lease_only_when_it_lasts(holder: Holder) -> None:
    confirmed_at = holder.lease.last_ok
    assert not holder.beat(is_away=True)
    assert not holder.beat(is_away=True)
    assert (holder.lease.last_ok, holder.counters["lease.failed"]) == (confirmed_at, 2)
    assert holder.is_right(), "the lease outlives two beats"
    assert not holder.beat(is_away=True)
    assert not holder.is_right(), "and no more"
    assert holder.beat(), "the store has forgotten the worker"
    assert holder.is_right()


def test_an_answer_that_was_lost_is_taken_for_a_loss_at_worst(holder: Holder) -> None:
    assert not holder.beat(answer_is_lost=True)
    holder.beat()
    assert holder.is_right()
    assert not holder.beat()
