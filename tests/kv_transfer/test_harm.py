"""Frames that failpoints lose, repeat, hold back or damage: the outcome is told in time, and no byte is ever wrong."""

import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from isthmus.failpoints import Failpoints
from isthmus.types import Extent
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer
from kv_transfer.sender import Sender
from kv_transfer.sender_options import SenderOptions
from tests.kv_transfer.world import (
    DecodeSide,
    PrefillSide,
    Sending,
    assert_moved,
    extents,
    shuffled,
    started_sender,
    wait_until,
)
from tests.kv_transfer.world import Pool as PoolOf

NUM_TOKENS = 150
OURS, THEIRS, MISSING = shuffled(1, 10), shuffled(2, 10), extents(0, NUM_TOKENS)
POOL = PoolOf(seed=3)


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    with DecodeSide() as side:
        yield side


def sender(spec: str) -> Sender:
    options = SenderOptions(max_frame_bytes=500, ack_timeout_s=0.3, failpoints=Failpoints.parse(spec))
    return started_sender(POOL.memory, options=options)


def send(sender: Sender, decode: DecodeSide) -> Sending:
    return PrefillSide(sender, POOL).send(decode.reserve(THEIRS, MISSING), OURS).all_rows(NUM_TOKENS).commit()


@pytest.mark.parametrize(
    "spec",
    [
        "transfer.fill=kill@100000",
        "transfer.fill=duplicate@every(3)",
        "transfer.fill=reorder@2",
        "transfer.fill=reorder@every(2)",
        "transfer.commit=duplicate",
        "transfer.ack=duplicate",
        "transfer.fill=duplicate@5;transfer.fill=reorder@every(4);transfer.commit=duplicate;transfer.ack=duplicate@2",
    ],
)
def test_repeated_and_reordered_frames_change_nothing(decode: DecodeSide, spec: str) -> None:
    with closing(sender(spec)) as sending:
        assert send(sending, decode).outcome().acked
        assert isinstance(decode.next(), ClaimedTransfer)
    assert_moved(POOL, OURS, decode.pool, THEIRS, MISSING)
    assert decode.quiet()


def test_a_commit_may_come_before_the_last_rows(decode: DecodeSide) -> None:
    frames = [len(POOL.rows[place][0]) for place in POOL.rows]  # bytes of a row
    num_frames = sum(-(-num // (500 // row_bytes)) for row_bytes in frames for num in (64, 64, 22))
    with closing(sender(f"transfer.fill=reorder@{num_frames}")) as sending:
        outcome = send(sending, decode).outcome()
    assert (outcome.acked, outcome.frames) == (True, num_frames)
    assert isinstance(decode.next(), ClaimedTransfer)
    assert_moved(POOL, OURS, decode.pool, THEIRS, MISSING)


@pytest.mark.parametrize(
    ("spec", "failure"),
    [
        ("transfer.fill=drop@3", "no answer"),
        ("transfer.fill=corrupt@3", "refused: bad_checksum"),
        ("transfer.fill=raise@3", "internal error (FailpointError)"),
        ("transfer.commit=drop", "the commit was not acknowledged"),
        ("transfer.commit=reorder", "the commit was not acknowledged"),  # no frame follows it
        ("transfer.commit=corrupt", "refused: bad_checksum"),
        ("transfer.ack=drop", "no answer"),
        ("transfer.ack=corrupt@1", "bad answer: damaged"),
    ],
)
def test_lost_and_damaged_frames_fail_the_transfer_in_time(decode: DecodeSide, spec: str, failure: str) -> None:
    with closing(sender(spec)) as sending:
        outcome = send(sending, decode).outcome(2)
    assert (outcome.acked, outcome.failure) == (False, failure)


def test_another_sender_brings_only_what_a_lost_frame_left_missing(decode: DecodeSide) -> None:
    target = decode.reserve(THEIRS, MISSING)
    with closing(sender("transfer.fill=drop@4")) as first:
        outcome = PrefillSide(first, POOL).send(target, OURS).all_rows(NUM_TOKENS).commit().outcome(2)
        assert not outcome.acked
    missing = decode.receiver.rearm(target.transfer_id, 2, time.monotonic() + 10)
    assert missing == (Extent("latent", 0, 36, 12),)
    with closing(started_sender(POOL.memory)) as second:
        retry = PrefillSide(second, POOL).send(decode.target(target.transfer_id, 2, missing), OURS)
        assert retry.all_rows(NUM_TOKENS).commit().outcome().frames == 1
    assert_moved(POOL, OURS, decode.pool, THEIRS, MISSING)


def test_a_receiver_that_misses_the_abort_ends_the_fill_at_its_deadline(decode: DecodeSide) -> None:
    target = decode.reserve(THEIRS, MISSING, fill_s=1.0)
    with closing(sender("transfer.abort=drop")) as sending:
        transfer = PrefillSide(sending, POOL).send(target, OURS)
        transfer.transfer.rows_ready("latent", 0, 0, 16)
        wait_until(lambda: any(event.event == "handoff.filling" for event in decode.ledger.read()))
        transfer.transfer.abort("cancelled")
        assert transfer.outcome().failure == "cancelled"
        failed = decode.next()
    assert isinstance(failed, FailedTransfer)
    assert failed.reason == "fill_deadline"
