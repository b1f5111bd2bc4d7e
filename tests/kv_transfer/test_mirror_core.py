"""The mirror's core in virtual time: order, bound, retries, restatements, and a store that forgets."""

import random

import pytest

from kv_transfer.counters import Counters
from kv_transfer.ownership.changes import (
    AdvanceHandoff,
    BeginHandoff,
    DropStream,
    MirroredChange,
    PutStream,
    Restate,
    apply,
)
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.ownership.mirror import RETRY_S, Mirror
from kv_transfer.ownership.store import (
    HandoffRecord,
    StoreRefused,
    StoreUnavailable,
    Transition,
    TransitionResult,
)
from tests.kv_transfer.virtual_store import VirtualStore, at_once

D1, D2 = "d" * 32, "e" * 32
RESERVED, FILLING, CLAIMED = HandoffState.RESERVED, HandoffState.FILLING, HandoffState.CLAIMED
HANDOFF = HandoffRecord("t", "request", D1)
AWAY = StoreUnavailable("away")


def put(number: int) -> PutStream:
    return PutStream(f"request-{number}", D1, 60)


def step(before: HandoffState, after: HandoffState) -> AdvanceHandoff:
    return AdvanceHandoff(Transition("t", before, after, 1))


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture
def mirror(counters: Counters) -> Mirror:
    return Mirror(counters, max_changes=5)


def drain(mirror: Mirror, store: VirtualStore) -> list[MirroredChange]:
    """What the driver does, until nothing is to be done now. Returns the changes in the order they were taken."""
    taken: list[MirroredChange] = []
    while (change := mirror.take(store.clock.now())) is not None:
        taken.append(change)
        try:
            answer = None if isinstance(change, Restate) else at_once(apply(change, store))
        except Exception as error:  # noqa: BLE001 - as the driver does
            mirror.fail(error, store.clock.now())
        else:
            mirror.settle(answer)
    return taken


def test_changes_are_applied_in_the_order_of_their_reports(mirror: Mirror, counters: Counters) -> None:
    store = VirtualStore()
    changes = [BeginHandoff(HANDOFF, 60), step(RESERVED, FILLING), put(1), DropStream("request-1", D1), put(2)]
    for change in changes:
        mirror.report(change)
    assert drain(mirror, store) == changes
    record = at_once(store.find_handoff("t"))
    assert record is not None
    assert record.state is FILLING
    assert at_once(store.streams.find("request-1")) is None
    assert at_once(store.streams.find("request-2")) == D1
    assert (len(mirror), mirror.call_at, counters) == (0, None, {})


def test_nothing_to_do_is_said_so(mirror: Mirror) -> None:
    assert mirror.take(1000.0) is None
    assert mirror.call_at is None


def test_a_change_is_tried_again_while_the_store_is_away(mirror: Mirror, counters: Counters) -> None:
    mirror.report(put(1))
    now = 1000.0
    for number in range(1, 4):
        assert mirror.take(now) == put(1)
        assert not mirror.fail(AWAY, now)
        assert mirror.call_at == now + RETRY_S
        mirror.report(put(number + 1))
        assert mirror.take(now + RETRY_S - 0.01) is None, "what is reported meanwhile does not bring the next try on"
        now += RETRY_S
        assert counters == {"mirror.unavailable": number}
    assert mirror.take(now) == put(1)
    mirror.settle(None)
    assert mirror.take(now) == put(2)


@pytest.mark.parametrize("error", [StoreRefused("garbage"), ZeroDivisionError()], ids=["refused", "our own fault"])
def test_a_change_that_fails_otherwise_is_given_up(mirror: Mirror, counters: Counters, error: Exception) -> None:
    mirror.report(put(1))
    mirror.report(put(2))
    assert mirror.take(0.0) == put(1)
    assert mirror.fail(error, 0.0)
    assert mirror.take(0.0) == put(2)
    assert counters == {"mirror.failed": 1}


def test_refusals_and_unknown_ids_are_counted_and_hold_nothing_up(mirror: Mirror, counters: Counters) -> None:
    store = VirtualStore()
    for change in (step(RESERVED, FILLING), BeginHandoff(HANDOFF, 60), step(CLAIMED, HandoffState.RELEASED), put(1)):
        mirror.report(change)
    assert len(drain(mirror, store)) == 4
    assert counters == {"mirror.unknown": 1, "mirror.refused": 1}
    assert at_once(store.streams.find("request-1")) == D1


def test_at_the_bound_the_oldest_change_goes(mirror: Mirror, counters: Counters) -> None:
    for number in range(8):
        mirror.report(put(number))
    assert counters == {"mirror.dropped": 3}
    assert drain(mirror, VirtualStore()) == [put(number) for number in range(3, 8)]


@pytest.mark.parametrize("answer", [None, TransitionResult.APPLIED, StoreRefused("garbage"), AWAY], ids=str)
def test_a_change_dropped_while_it_is_applied_takes_no_other_with_it(
    mirror: Mirror, answer: TransitionResult | Exception | None
) -> None:
    mirror.report(put(0))
    assert mirror.take(0.0) == put(0)
    for number in range(1, 6):
        mirror.report(put(number))
    if isinstance(answer, Exception):
        mirror.fail(answer, 0.0)
    else:
        mirror.settle(answer)
    assert len(mirror) == 5
    assert mirror.take(RETRY_S) == put(1)


def test_the_same_change_reported_twice_is_applied_twice(mirror: Mirror) -> None:
    same = put(1)
    mirror.report(same)
    mirror.report(same)
    assert drain(mirror, VirtualStore()) == [same, same]


def test_of_several_restatements_that_wait_only_the_newest_has_its_turn(mirror: Mirror) -> None:
    for change in (Restate(), put(1), Restate(), put(2)):
        mirror.report(change)
    assert drain(mirror, VirtualStore()) == [put(1), Restate(), put(2)]
    mirror.report(Restate())
    assert drain(mirror, VirtualStore()) == [Restate()]


def test_a_restatement_is_also_made_when_another_is_asked_for_meanwhile(mirror: Mirror) -> None:
    mirror.report(Restate())
    assert mirror.take(0.0) == Restate()
    mirror.report(Restate())
    mirror.settle(None)
    assert mirror.take(0.0) == Restate()


@pytest.mark.parametrize("harm", ["flush", "roll back", "overwrite"])
def test_a_restatement_puts_right_what_the_store_lost_or_got_wrong(
    mirror: Mirror, counters: Counters, harm: str
) -> None:
    store = VirtualStore()
    mirror.report(BeginHandoff(HANDOFF, 60))
    drain(mirror, store)
    older = store.keys.copy()
    mirror.report(step(RESERVED, FILLING))
    mirror.report(put(1))
    drain(mirror, store)

    if harm == "flush":
        store.flush()
    elif harm == "roll back":
        store.keys = older
    else:
        store.keys.handoffs.put("t", {b"state": b"FILLING", b"attempt": b"many"}, 60)
        store.keys.streams.put("request-1", b"\xff", 60)
    mirror.report(step(FILLING, CLAIMED))  # too early to be right
    mirror.report(Restate())
    assert drain(mirror, store)[-1] == Restate()
    held = HandoffRecord("t", "request", D1, state=CLAIMED)
    mirror.report(BeginHandoff(held, 60))
    mirror.report(put(1))
    drain(mirror, store)

    assert at_once(store.find_handoff("t")) == held
    assert at_once(store.streams.find("request-1")) == D1
    assert sum(counters.values()) == 1, "the step that came too early"


@pytest.mark.parametrize("seed", range(100))
def test_what_is_not_dropped_is_applied_once_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    counters = Counters()
    bound = rng.randint(1, 6)
    mirror = Mirror(counters, max_changes=bound)
    reported: list[MirroredChange] = []
    waiting: list[MirroredChange] = []  # as it should be
    applied: list[MirroredChange] = []
    now = 0.0
    taken: MirroredChange | None = None
    for _ in range(300):
        action = rng.random()
        if action < 0.4:
            reported.append(put(len(reported)))
            mirror.report(reported[-1])
            waiting = [*waiting, reported[-1]][-bound:]
        elif taken is None:
            now += rng.choice((0.0, RETRY_S))
            taken = mirror.take(now)
        else:
            if action < 0.6:
                mirror.fail(AWAY, now)
            else:
                applied.append(taken)
                mirror.settle(None)
                waiting = [change for change in waiting if change != taken]
            taken = None
    assert applied == sorted(set(applied), key=reported.index), f"seed {seed}"
    store = VirtualStore()
    store.clock.advance(now)
    assert drain(mirror, store) == waiting, f"seed {seed}"
    # A change that the bound dropped while it was being applied was both dropped and applied.
    assert counters["mirror.dropped"] >= len(reported) - len(applied) - len(waiting), f"seed {seed}"
