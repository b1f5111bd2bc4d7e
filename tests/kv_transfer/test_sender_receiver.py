"""Real transfers over ZeroMQ: every byte where it belongs, nothing beside it, and every failure told at once."""

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from isthmus.errors import CannotStart, LayoutMismatch, Overloaded, StaleOwner
from isthmus.ids import SystemIds
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions
from kv_transfer.sender_options import SenderOptions
from tests.kv_transfer.conftest import free_port, open_descriptors
from tests.kv_transfer.world import (
    PLACES,
    POISON,
    DecodeSide,
    PrefillSide,
    assert_moved,
    extents,
    shuffled,
    started_sender,
    wait_until,
)
from tests.kv_transfer.world import Pool as PoolOf

NUM_TOKENS = 150  # nine blocks and a part
SMALL_FRAMES = SenderOptions(staging_bytes=2**20, max_frame_bytes=500)


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    with DecodeSide() as side:
        yield side


@pytest.fixture(params=[SenderOptions(), SMALL_FRAMES], ids=["whole", "small_frames"])
def prefill(request: pytest.FixtureRequest) -> Iterator[PrefillSide]:
    pool = PoolOf(seed=3)
    with closing(started_sender(pool.memory, options=request.param)) as sender:
        yield PrefillSide(sender, pool)


def test_a_prompt_arrives_whole_and_nothing_beside_it(prefill: PrefillSide, decode: DecodeSide) -> None:
    ours, theirs, missing = shuffled(1, 10), shuffled(2, 10), extents(0, NUM_TOKENS)
    target = decode.reserve(theirs, missing)
    outcome = prefill.send(target, ours).all_rows(NUM_TOKENS).commit().outcome()
    claimed = decode.next()
    assert isinstance(claimed, ClaimedTransfer)
    assert claimed.tokens == (Token(7, -0.25, ((7, -0.25), (3, -2.0))),)
    assert outcome.acked
    assert outcome.failure == ""
    assert outcome.bytes == NUM_TOKENS * decode.pool.layout.bytes_per_token
    assert outcome.frames >= len(PLACES)
    (event,) = (event for event in decode.ledger.read() if event.event == "handoff.claimed")
    assert event.fields["bytes"] == str(outcome.bytes)
    assert outcome.blocks == 10
    assert outcome.last_ack_ns is not None
    assert_moved(prefill.pool, ours, decode.pool, theirs, missing)
    assert decode.receiver.counters == {}


def test_a_move_brings_the_rows_and_the_tokens_so_far(prefill: PrefillSide, decode: DecodeSide) -> None:
    ours, theirs, tokens = shuffled(1, 10), shuffled(2, 10), tuple(Token(i, -i / 7, ((i, -1.5),)) for i in range(31))
    target = decode.reserve(theirs, extents(16, NUM_TOKENS), open_from=60)
    moved = extents(16, 60 + 30)
    sending = prefill.send(replace(target, missing=moved), ours).all_rows(90)
    sending.transfer.commit(*tokens)
    assert sending.outcome().acked
    claimed = decode.next()
    assert isinstance(claimed, ClaimedTransfer)
    assert [token.id for token in claimed.tokens] == list(range(31))
    assert claimed.tokens[7].top_logprobs == ((7, -1.5),)
    assert_moved(prefill.pool, ours, decode.pool, theirs, moved)


def test_more_tokens_than_a_commit_holds_are_refused_before_they_leave(
    prefill: PrefillSide, decode: DecodeSide
) -> None:
    sending = prefill.send(decode.reserve([0], extents(0, 16), open_from=16), [0]).all_rows(16)
    sending.transfer.commit(*[Token(2**31, -0.5, tuple((2**31, -1.5) for _ in range(20)))] * 20_000)
    assert sending.outcome().failure == "too many tokens for a commit"
    assert isinstance(decode.next(), FailedTransfer)


def test_an_abort_by_the_sender_leaves_the_rows_to_the_next_attempt(prefill: PrefillSide, decode: DecodeSide) -> None:
    ours, theirs, missing = shuffled(1, 10), shuffled(2, 10), extents(0, NUM_TOKENS)
    target = decode.reserve(theirs, missing)
    first = prefill.send(target, ours)
    first.transfer.rows_ready("latent", 0, 0, NUM_TOKENS)
    transfers = prefill.sender._core._transfers
    wait_until(lambda: first.transfer.number in transfers)
    state = transfers[first.transfer.number]
    wait_until(lambda: state.outcome.frames and not state.pieces and not state.num_in_flight)
    first.transfer.abort("cancelled")
    failed = decode.next()
    assert isinstance(failed, FailedTransfer)
    assert not failed.is_ended
    rest = decode.receiver.rearm(target.transfer_id, 2, time.monotonic() + 10)
    assert rest == failed.missing
    assert ("latent", 0) not in {extent.place for extent in rest}
    again = prefill.send(decode.target(target.transfer_id, 2, rest), ours).all_rows(NUM_TOKENS).commit()
    assert again.outcome().acked
    assert isinstance(decode.next(), ClaimedTransfer)
    assert_moved(prefill.pool, ours, decode.pool, theirs, missing)


def test_only_the_missing_ranges_travel(prefill: PrefillSide, decode: DecodeSide) -> None:
    ours, theirs = shuffled(3, 10), list(range(10))
    missing = (*extents(32, 90, PLACES[:4]), Extent("index", 1, 40, 3), Extent("index", 1, 100, 7))
    outcome = prefill.send(decode.reserve(theirs, missing), ours).all_rows(NUM_TOKENS).commit().outcome()
    assert outcome.acked
    assert isinstance(decode.next(), ClaimedTransfer)
    assert_moved(prefill.pool, ours, decode.pool, theirs, missing)


def test_rows_leave_before_the_last_are_ready(prefill: PrefillSide, decode: DecodeSide) -> None:
    target = decode.reserve([0], extents(0, 16))
    sending = prefill.send(target, [5])
    sending.transfer.rows_ready("latent", 0, 0, 16)
    wait_until(lambda: any(e.event == "transfer.first_frame_received" for e in decode.ledger.read()))
    assert decode.quiet()
    sending.all_rows(16).commit()
    assert sending.outcome().acked
    events = [event.event for event in decode.ledger.read()]
    assert events == [
        "handoff.reserved",
        "handoff.filling",
        "transfer.first_frame_received",
        "transfer.covered",
        "handoff.claimed",
    ]
    decode.receiver.release(target.transfer_id)
    assert decode.ledger.read()[-1].event == "handoff.released"


def test_a_fully_cached_prompt_moves_no_row(prefill: PrefillSide, decode: DecodeSide) -> None:
    outcome = prefill.send(decode.reserve([0], ()), [5]).all_rows(16).commit().outcome()
    assert outcome.acked
    assert outcome.bytes == outcome.frames == 0
    assert isinstance(decode.next(), ClaimedTransfer)


def test_credit_far_below_the_transfer_only_slows_it() -> None:
    pool, ours, theirs, missing = PoolOf(seed=4), shuffled(5, 30), shuffled(6, 30), extents(0, 480)
    with (
        DecodeSide(ReceiverOptions(credit_bytes=400)) as decode,
        closing(started_sender(pool.memory)) as sender,
    ):
        outcome = PrefillSide(sender, pool).send(decode.reserve(theirs, missing), ours).all_rows(480).commit().outcome()
        assert outcome.acked
        assert outcome.frames > 200
        assert_moved(pool, ours, decode.pool, theirs, missing)
        assert decode.receiver.counters == {}


def test_staging_far_below_the_transfer_only_slows_it(decode: DecodeSide) -> None:
    pool, ours, theirs, missing = PoolOf(seed=4), shuffled(5, 30), shuffled(6, 30), extents(0, 480)
    options = SenderOptions(staging_bytes=8192, max_frame_bytes=2000)
    with closing(started_sender(pool.memory, options=options)) as sender:
        assert (
            PrefillSide(sender, pool).send(decode.reserve(theirs, missing), ours).all_rows(480).commit().outcome().acked
        )
        assert_moved(pool, ours, decode.pool, theirs, missing)


def test_many_transfers_share_the_link_and_stay_apart(prefill: PrefillSide, decode: DecodeSide) -> None:
    tables = [list(range(at, at + 3)) for at in range(0, 30, 3)]
    sendings = [prefill.send(decode.reserve(table, extents(0, 40)), table) for table in tables]
    for plane, layer in PLACES:
        for sending in sendings:
            sending.transfer.rows_ready(plane, layer, 0, 40)
    assert all(sending.commit().outcome().acked for sending in sendings)
    for place, rows in decode.pool.rows.items():
        for table in tables:
            slots = decode.pool.slots(table, 0, 40)
            np.testing.assert_array_equal(rows[slots], prefill.pool.rows[place][slots])


def test_a_cancel_at_prefill_frees_decode_and_tells_nobody_twice(prefill: PrefillSide, decode: DecodeSide) -> None:
    sending = prefill.send(decode.reserve(shuffled(1, 10), extents(0, NUM_TOKENS)), shuffled(2, 10))
    sending.transfer.rows_ready("latent", 0, 0, NUM_TOKENS)
    sending.transfer.abort("cancelled")
    sending.all_rows(NUM_TOKENS).commit().transfer.abort("again")
    outcome = sending.outcome()
    assert (outcome.acked, outcome.failure) == (False, "cancelled")
    failed = decode.next()
    assert isinstance(failed, FailedTransfer)
    assert (failed.reason, failed.finished) == ("cancelled", False)
    assert sending.transfer.number not in prefill.sender._core._transfers


def test_a_request_finished_at_token_0_is_no_failure(prefill: PrefillSide, decode: DecodeSide) -> None:
    sending = prefill.send(decode.reserve([1], extents(0, 16)), [2]).all_rows(16)
    sending.transfer.abort("stop at token 0", finished=True)
    failed = decode.next()
    assert isinstance(failed, FailedTransfer)
    assert failed.finished
    assert not sending.outcome().acked


def test_a_cancel_at_decode_stops_prefill_and_every_write(prefill: PrefillSide, decode: DecodeSide) -> None:
    theirs = shuffled(1, 10)
    target = decode.reserve(theirs, extents(0, NUM_TOKENS))
    sending = prefill.send(target, shuffled(2, 10))
    sending.transfer.rows_ready("latent", 0, 0, NUM_TOKENS)
    wait_until(lambda: (decode.pool.rows["latent", 0] != POISON).any())
    assert decode.receiver.cancel(target.transfer_id, "client left")
    for rows in decode.pool.rows.values():
        rows[:] = POISON  # the blocks belong to somebody else now
    sending.all_rows(NUM_TOKENS).commit()
    assert not sending.outcome().acked
    assert all((rows == POISON).all() for rows in decode.pool.rows.values())
    assert decode.quiet()
    assert not decode.receiver.cancel(target.transfer_id, "again")


def test_cancels_racing_with_writes_never_let_one_slip_through(prefill: PrefillSide, decode: DecodeSide) -> None:
    for round_number in range(30):
        theirs = shuffled(round_number, 10)
        target = decode.reserve(theirs, extents(0, NUM_TOKENS))
        sending = prefill.send(target, shuffled(7, 10)).all_rows(NUM_TOKENS)
        time.sleep(round_number % 6 * 0.0005)
        decode.receiver.cancel(target.transfer_id, "race")
        for rows in decode.pool.rows.values():
            rows[:] = POISON
        sending.commit().outcome()
        assert all((rows == POISON).all() for rows in decode.pool.rows.values())


def test_a_rearmed_transfer_is_filled_by_another_and_the_first_is_fenced(
    prefill: PrefillSide, decode: DecodeSide
) -> None:
    ours, theirs, missing = shuffled(1, 10), shuffled(2, 10), extents(0, NUM_TOKENS)
    target = decode.reserve(theirs, missing)
    zombie = prefill.send(target, ours)
    zombie.transfer.rows_ready("latent", 0, 0, NUM_TOKENS)
    wait_until(lambda: any(e.event == "transfer.first_frame_received" for e in decode.ledger.read()))
    rest = decode.receiver.rearm(target.transfer_id, 2, time.monotonic() + 10)
    zombie.all_rows(NUM_TOKENS).commit()
    assert "old_attempt" in zombie.outcome().failure
    with closing(started_sender(prefill.pool.memory)) as other:
        again = PrefillSide(other, prefill.pool).send(decode.target(target.transfer_id, 2, rest), ours)
        outcome = again.all_rows(NUM_TOKENS).commit().outcome()
    assert outcome.acked
    assert outcome.bytes < NUM_TOKENS * decode.pool.layout.bytes_per_token
    assert isinstance(decode.next(), ClaimedTransfer)
    assert_moved(prefill.pool, ours, decode.pool, theirs, missing)
    assert decode.receiver.counters["refused.old_attempt"] >= 1


def test_the_fill_deadline_names_what_is_missing_and_stops_prefill(prefill: PrefillSide, decode: DecodeSide) -> None:
    sending = prefill.send(decode.reserve([4], extents(0, 16), fill_s=0.3), [6])
    sending.transfer.rows_ready("latent", 1, 0, 16)
    failed = decode.next(3)
    assert isinstance(failed, FailedTransfer)
    assert failed.reason == "fill_deadline"
    assert failed.missing == tuple(e for e in extents(0, 16) if e.place != ("latent", 1))
    assert "fill_deadline" in sending.outcome(3).failure


def test_a_restarted_receiver_refuses_the_old_incarnation_at_once(prefill: PrefillSide) -> None:
    port = free_port()
    with DecodeSide(ReceiverOptions(port=port)) as first:
        target = first.reserve([0], extents(0, 16))
        sending = prefill.send(target, [0])
        sending.transfer.rows_ready("latent", 0, 0, 16)
        wait_until(lambda: any(e.event == "transfer.first_frame_received" for e in first.ledger.read()))
    begin = time.monotonic()
    assert "connection lost" in sending.outcome().failure
    with DecodeSide(ReceiverOptions(port=port)) as second:
        outcome = prefill.send(target, [0]).all_rows(16).commit().outcome()
        assert "stale_owner" in outcome.failure
        assert second.receiver.counters["refused.stale_owner"] >= 1
        assert all((rows == POISON).all() for rows in second.pool.rows.values())
    assert time.monotonic() - begin < 2


def test_nobody_at_the_endpoint_fails_at_once(prefill: PrefillSide) -> None:
    layout = prefill.pool.layout.fingerprint
    begin = time.monotonic()
    for endpoint in (f"tcp://127.0.0.1:{free_port()}", "nonsense", "ipc:///tmp/somewhere", "tcp://"):
        target = TransferTarget(
            SystemIds().transfer_id(), 1, endpoint, SystemIds().incarnation(), layout, extents(0, 16)
        )
        assert not prefill.send(target, [0]).all_rows(16).commit().outcome().acked
    assert time.monotonic() - begin < 2


def test_a_receiver_that_never_answers_is_given_up() -> None:
    with DecodeSide() as silent:
        pool = PoolOf()
        options = SenderOptions(ack_timeout_s=0.3)
        silent.receiver._receive = lambda parts: None  # type: ignore[method-assign]
        with closing(started_sender(pool.memory, options=options)) as sender:
            sending = PrefillSide(sender, pool).send(silent.reserve([0], extents(0, 16)), [0]).all_rows(16).commit()
            assert sending.outcome(3).failure == "no answer"


def test_a_commit_before_its_rows_fails_at_once(prefill: PrefillSide, decode: DecodeSide) -> None:
    sending = prefill.send(decode.reserve([4], extents(0, 16)), [6])
    sending.transfer.rows_ready("latent", 1, 0, 16)
    assert sending.commit().outcome().failure == "committed before its rows"
    assert isinstance(decode.next(), FailedTransfer)


def test_what_cannot_be_opened_is_refused_to_the_caller(decode: DecodeSide) -> None:
    pool = PoolOf()
    with closing(started_sender(pool.memory, options=SenderOptions(max_transfers=1))) as sender:
        side = PrefillSide(sender, pool)
        good = decode.reserve([0], extents(0, 16))
        with pytest.raises(LayoutMismatch):
            side.send(TransferTarget(good.transfer_id, 1, good.zmq_endpoint, good.receiver_incarnation, "0" * 32), [0])
        with pytest.raises(ValueError, match="hex"):
            side.send(
                TransferTarget("zz", 1, good.zmq_endpoint, good.receiver_incarnation, good.layout_fingerprint), [0]
            )
        with pytest.raises(ValueError, match="block ids"):
            side.send(good, [99])
        first = side.send(good, [0])
        with pytest.raises(Overloaded):
            side.send(good, [0])
        first.all_rows(16).commit()
        assert first.outcome().acked
        wait_until(lambda: sender._num_open == 0)
    with pytest.raises(Overloaded):
        side.send(good, [0])


def test_a_port_in_use_is_named() -> None:
    with DecodeSide() as first:
        port = int(first.receiver.endpoint.rsplit(":", 1)[1])
        with pytest.raises(CannotStart, match="zmq_port"), DecodeSide(ReceiverOptions(port=port)):
            pass


def test_a_cancelled_id_cannot_be_reserved(decode: DecodeSide) -> None:
    target = decode.reserve([0], extents(0, 16))
    decode.receiver.cancel(target.transfer_id, "gone")
    with pytest.raises(StaleOwner):
        decode.receiver.rearm(target.transfer_id, 2, time.monotonic() + 1)


def test_a_faulty_handler_does_not_end_the_others(decode: DecodeSide, prefill: PrefillSide) -> None:
    def fault(_: object) -> None:
        raise RuntimeError("a handler's bug")

    target = decode.reserve([0], extents(0, 16))
    prefill.sender.open(target, [0], fault).abort("x")
    assert prefill.send(decode.reserve([1], extents(0, 16)), [1]).all_rows(16).commit().outcome().acked


def test_closing_leaves_no_thread_and_no_descriptor() -> None:
    def one_transfer() -> None:
        pool = PoolOf()
        with DecodeSide() as decode, closing(started_sender(pool.memory)) as sender:
            side = PrefillSide(sender, pool)
            assert side.send(decode.reserve([0, 2], extents(0, 32)), [0, 2]).all_rows(32).commit().outcome().acked
            side.send(decode.reserve([1], extents(0, 16)), [1]).all_rows(16)  # still open when both close

    one_transfer()  # ZeroMQ's own helper thread starts once per process
    gc.collect()
    threads, descriptors = threading.active_count(), open_descriptors()
    for _ in range(5):
        one_transfer()
    gc.collect()
    wait_until(lambda: threading.active_count() <= threads and open_descriptors() <= descriptors)


def test_closing_the_sender_reports_every_open_transfer(decode: DecodeSide) -> None:
    pool = PoolOf()
    sender = started_sender(pool.memory)
    sendings = [PrefillSide(sender, pool).send(decode.reserve([0], extents(0, 16)), [0]) for _ in range(5)]
    sender.close()
    assert [sending.outcome().failure for sending in sendings] == ["sender_closed"] * 5
