"""Planes: names in code, numbers on the wire, and advisory ones that no transfer waits for or fails over."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import numpy as np
import pytest

from isthmus import convert
from isthmus.clock import SystemClock
from isthmus.ids import SystemIds
from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.types import Extent, Token
from isthmus.v1 import prefill_pb2, types_pb2
from kv_transfer.coverage import Coverage, extents
from kv_transfer.frames import FrameHeader, FrameKind
from kv_transfer.messages import Commit
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions
from kv_transfer.selftest import round_trip
from tests.kv_transfer.test_bad_frames import Intruder
from tests.kv_transfer.world import LAYOUT, POISON, DecodeSide, Pool, PrefillSide, Sending, assert_moved, started_sender

DRAFT = Plane("draft", PlaneKind.APPEND_ONLY, 2, 5, "fp32", advisory=True)
DRAFTING = replace(LAYOUT, planes=(LAYOUT.planes[0], DRAFT, LAYOUT.planes[1]))
OTHERS = {
    "none": LAYOUT,
    "rows of another size": replace(DRAFTING, planes=(*LAYOUT.planes, replace(DRAFT, row_elements=7))),
    "rows wider than any frame": replace(DRAFTING, planes=(*LAYOUT.planes, replace(DRAFT, row_elements=300))),
    "fewer layers": replace(DRAFTING, planes=(*LAYOUT.planes, replace(DRAFT, num_layers=1))),
    "more layers": replace(DRAFTING, planes=(*LAYOUT.planes, replace(DRAFT, num_layers=3))),
    "another plane too": replace(DRAFTING, planes=(*DRAFTING.planes, replace(DRAFT, name="second"))),
}
NUM_TOKENS = 40
OURS, THEIRS = [3, 1, 7], [5, 2, 4]


def test_a_layout_without_advisory_planes_has_the_fingerprint_it_always_had() -> None:
    assert LAYOUT.fingerprint == "003b70e2b63654bcf2d391affb06a0d4"


def test_advisory_planes_change_the_bytes_and_not_the_fingerprint() -> None:
    assert DRAFTING.fingerprint == LAYOUT.fingerprint
    assert DRAFTING.differing_fields(LAYOUT) == []
    assert DRAFTING.bytes_per_token == LAYOUT.bytes_per_token + 2 * 20
    required = replace(DRAFTING, planes=(*LAYOUT.planes, replace(DRAFT, advisory=False)))
    assert required.fingerprint != LAYOUT.fingerprint
    assert required.differing_fields(LAYOUT)


def test_required_planes_have_the_first_numbers_whatever_the_order() -> None:
    assert [DRAFTING.name_of(number) for number in range(3)] == ["latent", "index", "draft"]
    assert [DRAFTING.number_of(name) for name in ("latent", "index", "draft")] == [0, 1, 2]
    assert DRAFTING.places == [*LAYOUT.places, ("draft", 0), ("draft", 1)]
    assert DRAFTING.required_places == LAYOUT.places
    assert DRAFTING.plane("draft") is DRAFT
    for unknown in (3, -1):
        with pytest.raises(KeyError):
            DRAFTING.name_of(unknown)
    with pytest.raises(KeyError):
        DRAFTING.plane("other")


def test_two_planes_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        replace(LAYOUT, planes=(*LAYOUT.planes, replace(DRAFT, name="latent")))


def test_coverage_counts_required_planes_only() -> None:
    coverage = Coverage(DRAFTING, extents(DRAFTING, 0, 10))
    for place in DRAFTING.required_places:
        assert not coverage.is_complete
        coverage.cover(place, (0, 10))
    assert coverage.is_complete
    assert coverage.missing() == (Extent("draft", 0, 0, 10), Extent("draft", 1, 0, 10))
    assert coverage.missing_required() == ()
    coverage.cover(("draft", 1), (0, 4))
    assert coverage.missing() == (Extent("draft", 0, 0, 10), Extent("draft", 1, 4, 6))


def test_what_a_peer_asks_of_planes_that_are_not_here_is_left_out() -> None:
    asked = [convert.extent_to_proto(extent, DRAFTING) for extent in extents(DRAFTING, 0, 9)]
    assert [(extent.plane, extent.layer) for extent in asked] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert convert.extents_from_proto(asked, DRAFTING) == extents(DRAFTING, 0, 9)
    target = prefill_pb2.TransferTarget(missing=asked)
    assert convert.target_from_proto(target, LAYOUT).missing == extents(LAYOUT, 0, 9)


def test_a_status_shows_the_planes_and_the_shared_fingerprint() -> None:
    shown = convert.layout_to_proto(DRAFTING)
    assert [plane.name for plane in shown.planes] == ["latent", "draft", "index"]
    assert shown.fingerprint == LAYOUT.fingerprint
    assert isinstance(shown, types_pb2.KvLayout)


def test_the_self_test_moves_advisory_rows_too() -> None:
    round_trip(DRAFTING, SystemClock(), SystemIds())


@contextmanager
def pair(sending: KvLayout, receiving: KvLayout) -> Iterator[tuple[PrefillSide, DecodeSide]]:
    pool = Pool(seed=5, layout=sending, num_blocks=8)
    with (
        DecodeSide(ReceiverOptions(credit_bytes=400), Pool(POISON, layout=receiving, num_blocks=8)) as decode,
        closing(started_sender(pool.memory)) as sender,
    ):
        yield PrefillSide(sender, pool), decode


def begin(prefill: PrefillSide, decode: DecodeSide) -> Sending:
    """A transfer of everything that decode's layout has, as prefill hears of it."""
    missing = extents(decode.pool.layout, 0, NUM_TOKENS)
    target = decode.reserve(THEIRS, missing)
    asked = [convert.extent_to_proto(extent, decode.pool.layout) for extent in missing]
    heard = replace(target, missing=convert.extents_from_proto(asked, prefill.pool.layout))
    return prefill.send(heard, OURS)


def offer(sending: Sending, prefill: PrefillSide, planes: set[str]) -> None:
    for plane, layer in prefill.pool.layout.places:
        if plane in planes:
            sending.transfer.rows_ready(plane, layer, 0, NUM_TOKENS)


def test_advisory_rows_move_with_the_others() -> None:
    with pair(DRAFTING, DRAFTING) as (prefill, decode):
        sending = begin(prefill, decode)
        offer(sending, prefill, {"latent", "index", "draft"})
        outcome = sending.commit().outcome()
        assert outcome.acked
        assert isinstance(decode.next(), ClaimedTransfer)
        assert_moved(prefill.pool, OURS, decode.pool, THEIRS, extents(DRAFTING, 0, NUM_TOKENS))


@pytest.mark.parametrize("offered", [{"latent", "index"}, {"latent", "draft"}], ids=["no advisory row", "no index row"])
def test_a_commit_needs_every_required_row_and_no_advisory_one(offered: set[str]) -> None:
    with pair(DRAFTING, DRAFTING) as (prefill, decode):
        sending = begin(prefill, decode)
        offer(sending, prefill, offered)
        outcome = sending.commit().outcome()
        if "index" in offered:
            assert outcome.acked
            assert isinstance(decode.next(), ClaimedTransfer)
            assert_moved(prefill.pool, OURS, decode.pool, THEIRS, extents(LAYOUT, 0, NUM_TOKENS))
        else:
            assert outcome.failure == "committed before its rows"
            assert isinstance(decode.next(), FailedTransfer)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("differs", ["sender", "receiver"])
def test_peers_that_differ_in_advisory_planes_agree_on_the_rest(other: str, differs: str) -> None:
    sending_layout, receiving_layout = (OTHERS[other], DRAFTING) if differs == "sender" else (DRAFTING, OTHERS[other])
    with pair(sending_layout, receiving_layout) as (prefill, decode):
        sending = begin(prefill, decode)
        offer(sending, prefill, {"draft", "second"})
        offer(sending, prefill, {"latent", "index"})
        assert sending.commit().outcome().acked
        assert isinstance(decode.next(), ClaimedTransfer)
        shared = set(prefill.pool.layout.places) & set(decode.pool.layout.places)
        if "rows" in other:  # of another size
            shared = set(LAYOUT.places)
        moved = tuple(extent for extent in extents(receiving_layout, 0, NUM_TOKENS) if extent.place in shared)
        assert_moved(prefill.pool, OURS, decode.pool, THEIRS, moved)
        assert not [name for name in decode.receiver.counters if name.startswith("refused")]
        assert not [name for name in prefill.sender.counters if name.startswith("refused")]


def test_advisory_rows_that_come_after_the_claim_are_acknowledged_and_not_written() -> None:
    with DecodeSide(pool=Pool(POISON, layout=DRAFTING)) as decode:
        missing = extents(DRAFTING, 0, 16)
        transfer_id = decode.reserve([0], missing).transfer_id
        intruder = Intruder(decode)
        with closing(intruder):
            intruder.ask_credit()
            for extent in missing[:-1]:
                intruder.say(*fill(intruder, transfer_id, extent))
            body = Commit((Token(1),), DRAFTING.required(missing)).encode(DRAFTING)
            known = {"transfer": bytes.fromhex(transfer_id), "attempt": 1}
            intruder.say(intruder.header(FrameKind.COMMIT, **known), body)
            assert intruder.acked(len(missing))[-1] == FrameKind.COMMIT.value
            assert isinstance(decode.next(), ClaimedTransfer)
            decode.pool.rows["draft", 0][:16] = POISON  # the request's own by now
            for late in missing[-2:]:
                intruder.say(*fill(intruder, transfer_id, late))
            assert intruder.acked(2) == [FrameKind.FILL.value] * 2
        for place in (("draft", 0), ("draft", 1)):
            np.testing.assert_array_equal(decode.pool.rows[place], POISON)


def fill(intruder: Intruder, transfer_id: str, extent: Extent) -> tuple[FrameHeader, bytes]:
    number, row_bytes = DRAFTING.number_of(extent.plane), DRAFTING.plane(extent.plane).row_bytes
    header, _ = intruder.fill(transfer_id, replace(extent, plane="latent"), plane=number)
    return header, bytes([1]) * (extent.num_tokens * row_bytes)


def test_a_refused_advisory_frame_loses_only_itself() -> None:
    """The receiver has no such reservation: its answer ends no transfer whose required rows it takes."""
    with pair(DRAFTING, DRAFTING) as (prefill, decode):
        target = decode.reserve(THEIRS, extents(LAYOUT, 0, NUM_TOKENS))
        sending = prefill.send(replace(target, missing=extents(DRAFTING, 0, NUM_TOKENS)), OURS)
        offer(sending, prefill, {"latent", "index", "draft"})
        assert sending.commit().outcome().acked
        assert isinstance(decode.next(), ClaimedTransfer)
        assert prefill.sender.counters["refused_by_peer.out_of_range"] > 0
        assert_moved(prefill.pool, OURS, decode.pool, THEIRS, extents(LAYOUT, 0, NUM_TOKENS))


def test_late_advisory_rows_of_a_released_transfer_do_not_undo_its_success() -> None:
    with pair(DRAFTING, DRAFTING) as (prefill, decode):
        sending = begin(prefill, decode)
        offer(sending, prefill, {"latent", "index"})
        sending.commit()
        claimed = decode.next()
        assert isinstance(claimed, ClaimedTransfer)
        decode.receiver.release(claimed.transfer_id)
        offer(sending, prefill, {"draft"})
        assert sending.outcome().acked
