"""The receiving state machine, without memory or sockets: one seed decides what the network does to the frames."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from isthmus.errors import Overloaded, StaleOwner
from isthmus.ids import SystemIds
from isthmus.types import Extent, Token
from kv_transfer.coverage import Coverage, clipped, normalised
from kv_transfer.frames import BadFrame, FrameHeader, FrameKind, Refusal
from kv_transfer.messages import Commit
from kv_transfer.ownership.handoff import TRANSITIONS, HandoffState, is_allowed
from kv_transfer.transfers import TOMBSTONE_S, Accept, IncomingTransfer, IncomingTransfers, Reservation, StateChange
from tests.kv_transfer.world import LAYOUT, PLACES, SettableClock, extents

P1, P2, D = b"1" * 16, b"2" * 16, b"d" * 16
FINGERPRINT = bytes.fromhex(LAYOUT.fingerprint)


class Machine:
    """IncomingTransfers with a memory of who wrote which position last: (place, position) -> attempt."""

    def __init__(self, **limits: int):
        self.clock = SettableClock()
        self.changes: list[tuple[HandoffState | None, HandoffState]] = []
        self.written: dict[tuple[str, int, int], int] = {}
        self.transfers = IncomingTransfers(LAYOUT, on_change=self._note, **limits)

    def _note(self, change: StateChange) -> None:
        self.changes.append((change.previous, change.transfer.state))

    def reserve(self, missing: tuple[Extent, ...], fill_s: float = 10.0, open_from: int | None = None) -> str:
        transfer_id, deadline = SystemIds().transfer_id(), self.clock.now() + fill_s
        self.transfers.reserve(Reservation(transfer_id, 1, "r", tuple(range(8)), missing, deadline, open_from))
        return transfer_id

    def find(self, transfer_id: str) -> IncomingTransfer | None:
        return next((transfer for transfer in self.transfers if transfer.transfer_id == transfer_id), None)

    def fill(self, header: FrameHeader) -> Accept:
        """As the receiver does: check, write the gaps, note it."""
        accept = self.transfers.check_fill(header)
        for first, end in accept.gaps:
            for position in range(first, end):
                self.written[*accept.place, position] = header.attempt
        return self.transfers.filled(header)

    def commit(
        self,
        transfer_id: str,
        missing: tuple[Extent, ...],
        attempt: int = 1,
        sender: bytes = P1,
        num_tokens: int = 1,
    ) -> None:
        header = frame(transfer_id, FrameKind.COMMIT, attempt=attempt, sender=sender)
        self.transfers.committed(header, Commit((Token(1),) * num_tokens, missing))


def frame(transfer_id: str, kind: FrameKind, extent: Extent | None = None, **fields: object) -> FrameHeader:
    header = FrameHeader(kind, FINGERPRINT, P1, D, bytes.fromhex(transfer_id), 1)
    if extent is not None:
        size = extent.num_tokens * LAYOUT.plane(extent.plane).row_bytes
        place = {"plane": LAYOUT.number_of(extent.plane), "layer": extent.layer, "first_token": extent.first_token}
        header = replace(header, num_tokens=extent.num_tokens, body_bytes=size, **place)
    return replace(header, **fields)  # type: ignore[arg-type]


@contextmanager
def refused(expected: Refusal) -> Iterator[None]:
    with pytest.raises(BadFrame) as raised:
        yield
    assert raised.value.refusal is expected


def cut(rng: random.Random, missing: tuple[Extent, ...]) -> list[Extent]:
    """The extents as overlapping or touching frames of random sizes."""
    frames: list[Extent] = []
    for extent in missing:
        at = extent.first_token
        while at < extent.end:
            num = min(rng.randint(1, 40), extent.end - at)
            start = max(extent.first_token, at - rng.choice([0, 0, 3]))
            frames.append(Extent(extent.plane, extent.layer, start, at + num - start))
            at += num
    return frames


@pytest.mark.parametrize("seed", range(150))
def test_memory_is_written_exactly_where_it_is_covered_whatever_the_network_does(seed: int) -> None:
    rng = random.Random(seed)
    machine = Machine()
    first, end = sorted(rng.sample(range(1, 128), 2))
    missing = normalised(LAYOUT, extents(first, end, rng.sample(PLACES, rng.randint(1, len(PLACES)))))
    transfer_id = machine.reserve(missing)
    attempt, wanted = 1, missing
    mail = [frame(transfer_id, FrameKind.FILL, e) for e in cut(rng, missing)]
    mail.append(frame(transfer_id, FrameKind.COMMIT))
    mail = [f for f in mail for _ in range(rng.choice([0, 1, 1, 1, 2]))]  # dropped, delivered, duplicated
    rng.shuffle(mail)
    while mail:
        header = mail.pop()
        live = machine.find(transfer_id)
        before = dict(machine.written)
        was_accepted = True
        try:
            if header.kind is FrameKind.FILL:
                machine.fill(header)
            else:
                commit = Commit((Token(1),), wanted if header.attempt == attempt else missing)
                machine.transfers.committed(header, commit)
        except BadFrame:
            was_accepted = False
        if live is None or header.attempt != attempt:
            assert not was_accepted, f"seed {seed}: a fenced frame was accepted"
            assert machine.written == before
        check_invariant(machine, transfer_id, missing, seed)
        if live is not None and rng.random() < 0.03 and live.state is not HandoffState.CLAIMED:
            attempt += 1
            wanted = machine.transfers.rearm(transfer_id, attempt, machine.clock.now() + 10)
            fresh = [frame(transfer_id, FrameKind.FILL, e, attempt=attempt, sender=P2) for e in cut(rng, wanted)]
            mail.extend([*fresh, frame(transfer_id, FrameKind.COMMIT, attempt=attempt, sender=P2)])
            rng.shuffle(mail)
        if rng.random() < 0.005:
            machine.transfers.abort(transfer_id, "cancelled", machine.clock.now())
    machine.clock.time += 11
    failed = machine.transfers.expire(machine.clock.now())
    check_invariant(machine, transfer_id, missing, seed)
    live = machine.find(transfer_id)
    assert live is None or live.state is HandoffState.CLAIMED
    assert all(not t.coverage.is_complete or t.commit is None for t in failed), f"seed {seed}: a complete one failed"
    assert all(before is None or after is before or is_allowed(before, after) for before, after in machine.changes)


def check_invariant(machine: Machine, transfer_id: str, missing: tuple[Extent, ...], seed: int) -> None:
    asked = {(e.plane, e.layer, p) for e in missing for p in range(e.first_token, e.end)}
    assert set(machine.written) <= asked, f"seed {seed}: wrote outside the reservation"
    transfer = machine.find(transfer_id)
    if transfer is not None:
        left = {(e.plane, e.layer, p) for e in transfer.coverage.missing() for p in range(e.first_token, e.end)}
        assert set(machine.written) == asked - left, f"seed {seed}: coverage and memory disagree"
        is_ready = not left and transfer.commit is not None
        assert (transfer.state is HandoffState.CLAIMED) == is_ready, f"seed {seed}"
        row_bytes = {plane.name: plane.row_bytes for plane in LAYOUT.planes}
        assert transfer.num_bytes == sum(row_bytes[plane] for plane, _, _ in machine.written), f"seed {seed}"


def test_a_commit_waits_for_the_last_rows_and_is_taken_twice() -> None:
    machine, missing = Machine(), extents(16, 48)
    transfer_id = machine.reserve(missing)
    machine.commit(transfer_id, missing)
    for extent in missing:
        assert machine.find(transfer_id).state is HandoffState.FILLING  # type: ignore[union-attr]
        machine.fill(frame(transfer_id, FrameKind.FILL, extent))
    assert machine.find(transfer_id).state is HandoffState.CLAIMED  # type: ignore[union-attr]
    machine.commit(transfer_id, missing)
    assert [after for _, after in machine.changes] == [
        HandoffState.RESERVED,
        HandoffState.FILLING,
        HandoffState.CLAIMED,
    ]


def test_a_duplicate_frame_is_accepted_and_writes_nothing() -> None:
    machine, missing = Machine(), extents(0, 16)
    transfer_id = machine.reserve(missing)
    header = frame(transfer_id, FrameKind.FILL, missing[0])
    assert machine.fill(header).gaps == ((0, 16),)
    again = machine.fill(header)
    assert again.gaps == ()
    assert again.transfer.num_bytes == 16 * LAYOUT.planes[0].row_bytes


@pytest.mark.parametrize("seed", range(60))
def test_a_move_is_claimed_when_the_rows_of_its_tokens_are_there_in_whatever_order(seed: int) -> None:
    rng = random.Random(seed)
    machine, num_prompt, num_written = Machine(), 40, 100
    transfer_id = machine.reserve(extents(16, num_written), open_from=num_prompt)
    num_tokens = rng.randint(1, num_written - num_prompt + 1)
    wanted = extents(16, num_prompt + num_tokens - 1)
    mail = [frame(transfer_id, FrameKind.FILL, e) for e in cut(rng, wanted)]
    mail.append(frame(transfer_id, FrameKind.COMMIT))
    rng.shuffle(mail)
    for header in mail:
        assert machine.find(transfer_id).state is not HandoffState.CLAIMED  # type: ignore[union-attr]
        if header.kind is FrameKind.FILL:
            machine.fill(header)
        else:
            machine.transfers.committed(header, Commit((Token(1),) * num_tokens, wanted))
    assert machine.find(transfer_id).state is HandoffState.CLAIMED, f"seed {seed}"  # type: ignore[union-attr]
    machine.transfers.committed(mail[0], Commit((Token(1),) * num_tokens, wanted))  # again, changes nothing


@pytest.mark.parametrize("end", [39, 41, 44, 100])
def test_a_commit_that_rests_on_other_rows_than_its_tokens_need_is_refused(end: int) -> None:
    machine = Machine()
    transfer_id = machine.reserve(extents(0, 100), open_from=40)
    with refused(Refusal.WRONG_EXTENTS):
        machine.commit(transfer_id, extents(0, end), num_tokens=4)
    machine.commit(transfer_id, extents(0, 43), num_tokens=4)


@pytest.mark.parametrize("num_tokens", [0, 2])
def test_only_a_move_brings_more_tokens_than_one(num_tokens: int) -> None:
    machine, missing = Machine(), extents(0, 16)
    transfer_id = machine.reserve(missing)
    with refused(Refusal.WRONG_EXTENTS):
        machine.commit(transfer_id, missing, num_tokens=num_tokens)
    move = machine.reserve(missing, open_from=16)
    with refused(Refusal.WRONG_EXTENTS):
        machine.commit(move, missing, num_tokens=0)


def test_rows_beyond_a_move_are_refused() -> None:
    machine = Machine()
    transfer_id = machine.reserve(extents(0, 100), open_from=40)
    with refused(Refusal.OUT_OF_RANGE):
        machine.fill(frame(transfer_id, FrameKind.FILL, Extent("latent", 0, 90, 11)))


def test_a_prompt_alone_completes_a_rearmed_move() -> None:
    machine = Machine()
    transfer_id = machine.reserve(extents(0, 100), open_from=40)
    machine.fill(frame(transfer_id, FrameKind.FILL, Extent("latent", 0, 30, 50)))
    rest = clipped(machine.transfers.rearm(transfer_id, 2, machine.clock.now() + 10), 40)
    assert rest[0] == Extent("latent", 0, 0, 30)
    for extent in rest:
        machine.fill(frame(transfer_id, FrameKind.FILL, extent, attempt=2, sender=P2))
    machine.commit(transfer_id, rest, attempt=2, sender=P2)
    assert machine.find(transfer_id).state is HandoffState.CLAIMED  # type: ignore[union-attr]


def test_what_a_sender_left_waits_for_another_attempt_and_refuses_its_own() -> None:
    machine, missing = Machine(), extents(0, 32)
    transfer_id = machine.reserve(missing)
    machine.fill(frame(transfer_id, FrameKind.FILL, missing[0]))
    assert machine.transfers.abandon(transfer_id) is not None
    with refused(Refusal.LATE):
        machine.fill(frame(transfer_id, FrameKind.FILL, missing[1]))
    rest = machine.transfers.rearm(transfer_id, 2, machine.clock.now() + 10)
    assert rest == normalised(LAYOUT, missing[1:])
    for extent in rest:
        machine.fill(frame(transfer_id, FrameKind.FILL, extent, attempt=2))
    machine.commit(transfer_id, rest, attempt=2)
    assert machine.transfers.abandon(transfer_id) is None
    assert machine.find(transfer_id).state is HandoffState.CLAIMED  # type: ignore[union-attr]


def test_what_a_sender_left_and_nobody_took_up_ends_at_the_deadline() -> None:
    machine = Machine()
    transfer_id = machine.reserve(extents(0, 32), fill_s=10)
    machine.transfers.abandon(transfer_id)
    assert machine.transfers.expire(machine.clock.now()) == []
    machine.clock.time += 10
    assert [failed.transfer_id for failed in machine.transfers.expire(machine.clock.now())] == [transfer_id]


def test_a_fully_cached_prompt_needs_only_the_commit() -> None:
    machine = Machine()
    transfer_id = machine.reserve(())
    machine.commit(transfer_id, ())
    assert machine.find(transfer_id).state is HandoffState.CLAIMED  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"attempt": 0}, Refusal.OLD_ATTEMPT),
        ({"attempt": 2}, Refusal.FUTURE_ATTEMPT),
        ({"transfer": b"x" * 16}, Refusal.UNKNOWN_TRANSFER),
        ({"plane": 9}, Refusal.OUT_OF_RANGE),
        ({"layer": 9}, Refusal.OUT_OF_RANGE),
        ({"first_token": 0}, Refusal.OUT_OF_RANGE),  # a cached prefix, shared with others
        ({"first_token": 40}, Refusal.OUT_OF_RANGE),
        ({"num_tokens": 0}, Refusal.OUT_OF_RANGE),
        ({"num_tokens": 2**32 - 1}, Refusal.OUT_OF_RANGE),
        ({"first_token": 2**32 - 1, "num_tokens": 2**32 - 1}, Refusal.OUT_OF_RANGE),
        ({"body_bytes": 1}, Refusal.BAD_BODY),
    ],
)
def test_a_frame_that_does_not_fit_is_refused_by_name(changed: dict[str, object], expected: Refusal) -> None:
    machine, missing = Machine(), extents(16, 48)
    transfer_id = machine.reserve(missing)
    with refused(expected):
        machine.fill(frame(transfer_id, FrameKind.FILL, missing[0], **changed))
    assert machine.written == {}
    assert machine.changes == [(None, HandoffState.RESERVED)]


def test_a_second_sender_of_the_same_attempt_is_refused() -> None:
    machine, missing = Machine(), extents(0, 32)
    transfer_id = machine.reserve(missing)
    machine.fill(frame(transfer_id, FrameKind.FILL, missing[0]))
    with refused(Refusal.WRONG_SENDER):
        machine.fill(frame(transfer_id, FrameKind.FILL, missing[1], sender=P2))


def test_rearming_keeps_what_came_and_fences_the_first_writer() -> None:
    machine, missing = Machine(), extents(0, 32)
    transfer_id = machine.reserve(missing)
    machine.fill(frame(transfer_id, FrameKind.FILL, missing[0]))
    rest = machine.transfers.rearm(transfer_id, 2, machine.clock.now() + 10)
    assert rest == normalised(LAYOUT, missing[1:])
    with refused(Refusal.OLD_ATTEMPT):
        machine.fill(frame(transfer_id, FrameKind.FILL, missing[1]))
    for extent in rest:
        machine.fill(frame(transfer_id, FrameKind.FILL, extent, attempt=2, sender=P2))
    with refused(Refusal.WRONG_EXTENTS):
        machine.commit(transfer_id, missing, attempt=2, sender=P2)
    machine.commit(transfer_id, rest, attempt=2, sender=P2)
    assert machine.find(transfer_id).state is HandoffState.CLAIMED  # type: ignore[union-attr]
    with pytest.raises(StaleOwner):
        machine.transfers.rearm(transfer_id, 3, 0.0)


def test_a_cancelled_transfer_refuses_what_comes_late_until_its_tombstone_falls() -> None:
    machine, missing = Machine(), extents(0, 32)
    transfer_id = machine.reserve(missing, fill_s=10)
    machine.transfers.abort(transfer_id, "cancelled", machine.clock.now())
    late = frame(transfer_id, FrameKind.FILL, missing[0])
    with refused(Refusal.LATE):
        machine.fill(late)
    machine.clock.time += 10 + TOMBSTONE_S - 0.1
    machine.transfers.expire(machine.clock.now())
    with refused(Refusal.LATE):
        machine.fill(late)
    machine.clock.time += 0.2
    machine.transfers.expire(machine.clock.now())
    with refused(Refusal.UNKNOWN_TRANSFER):
        machine.fill(late)


def test_a_cancel_before_the_reserve_refuses_the_reserve() -> None:
    machine, transfer_id = Machine(), SystemIds().transfer_id()
    machine.transfers.abort(transfer_id, "cancelled", machine.clock.now())
    with pytest.raises(StaleOwner):
        machine.transfers.reserve(Reservation(transfer_id, 1, "r", (0,), (), machine.clock.now() + 1))


def test_a_claimed_transfer_neither_expires_nor_aborts_and_is_released_once() -> None:
    machine = Machine()
    transfer_id = machine.reserve(())
    machine.commit(transfer_id, ())
    machine.clock.time += 1000
    assert machine.transfers.expire(machine.clock.now()) == []
    assert machine.transfers.abort(transfer_id, "late", machine.clock.now()) is None
    assert machine.transfers.release(transfer_id, machine.clock.now()) is not None
    assert machine.transfers.release(transfer_id, machine.clock.now()) is None
    with refused(Refusal.LATE):
        machine.commit(transfer_id, ())


def test_expiry_names_what_is_missing() -> None:
    machine, missing = Machine(), extents(0, 32)
    transfer_id = machine.reserve(missing, fill_s=1)
    machine.fill(frame(transfer_id, FrameKind.FILL, Extent("latent", 0, 8, 8)))
    machine.clock.time += 1
    (failed,) = machine.transfers.expire(machine.clock.now())
    assert failed.coverage.missing()[:2] == (Extent("latent", 0, 0, 8), Extent("latent", 0, 16, 16))
    assert failed.state is HandoffState.ABORTED


def test_transfers_and_tombstones_are_bounded() -> None:
    machine = Machine(max_transfers=3, max_tombstones=5)
    for _ in range(20):
        live = [machine.reserve(extents(0, 16)) for _ in range(3)]
        with pytest.raises(Overloaded):
            machine.reserve(extents(0, 16))
        for transfer_id in live:
            machine.transfers.abort(transfer_id, "cancelled", machine.clock.now())
    assert len(machine.transfers) == 0
    assert len(machine.transfers._tombstones) == 5


@pytest.mark.parametrize(
    "extent",
    [Extent("none", 0, 0, 1), Extent("latent", 9, 0, 1), Extent("latent", 0, 0, 0), Extent("latent", 0, 100, 99)],
)
def test_a_reservation_outside_the_layout_is_our_own_bug(extent: Extent) -> None:
    machine = Machine()
    with pytest.raises(ValueError, match="Extent"):
        machine.reserve((extent,))
    assert len(machine.transfers) == 0


@pytest.mark.parametrize("seed", range(50))
def test_coverage_agrees_with_a_set_of_positions(seed: int) -> None:
    rng = random.Random(seed)
    asked = [Extent("latent", 0, rng.randint(0, 80), rng.randint(1, 30)) for _ in range(rng.randint(0, 6))]
    granted = {p for e in asked for p in range(e.first_token, e.end)}
    coverage, left = Coverage(LAYOUT, asked), set(granted)
    for _ in range(40):
        first = rng.randint(0, 110)
        interval = (first, first + rng.randint(1, 25))
        inside = set(range(*interval))
        assert coverage.grants(("latent", 0), interval) == (inside <= granted), f"seed {seed}"
        gaps = coverage.gaps(("latent", 0), interval)
        assert {p for gap in gaps for p in range(*gap)} == inside & left, f"seed {seed}"
        coverage.cover(("latent", 0), interval)
        left -= inside
        assert {p for e in coverage.missing() for p in range(e.first_token, e.end)} == left, f"seed {seed}"
        assert coverage.is_complete == (not left)


def test_the_transition_table_is_the_documented_one() -> None:
    assert {(a.value, b.value) for a, after in TRANSITIONS.items() for b in after} == {
        ("RESERVED", "FILLING"),
        ("RESERVED", "ABORTED"),
        ("FILLING", "CLAIMED"),
        ("FILLING", "ABORTED"),
        ("CLAIMED", "RELEASED"),
    }
    assert [state for state in HandoffState if state.is_final] == [HandoffState.RELEASED, HandoffState.ABORTED]
