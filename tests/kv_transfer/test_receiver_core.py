"""The receiving core alone: what it answers, what it reports and when it wants to be called. No thread, no time."""

from dataclasses import replace

import pytest

from isthmus.ledger import Ledger
from isthmus.testing.manual_clock import ManualClock
from isthmus.types import Extent, Token
from kv_transfer.frames import FrameHeader, FrameKind, seal
from kv_transfer.messages import Abort, Acks, Commit, decode_credit, encode_credit
from kv_transfer.receiver_core import ReceiverCore, Write
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions
from kv_transfer.replies import Reply
from kv_transfer.transfers import TOMBSTONE_S, Reservation, StateChange
from tests.kv_transfer.world import LAYOUT, extents

RECEIVER, SENDER = "bb" * 16, b"s" * 16
TRANSFER = "cc" * 16
LATENT = (Extent("latent", 0, 0, 16),)
ROW_BYTES = LAYOUT.plane("latent").row_bytes
COMMIT = Commit((Token(1),), LATENT).encode(LAYOUT)


class Receiving:
    """A core, the changes of state it told, and its outbox read as messages."""

    def __init__(self, **options: int):
        self.states: list[StateChange] = []
        settings = ReceiverOptions(**options)  # type: ignore[arg-type]
        self.core = ReceiverCore(bytes.fromhex(RECEIVER), LAYOUT, Ledger(ManualClock()), self.states.append, settings)

    def reserve(self, missing: tuple[Extent, ...] = LATENT, transfer_id: str = TRANSFER, deadline: float = 10) -> None:
        self.core.reserve(Reservation(transfer_id, 1, "request", (0, 1), missing, deadline))

    def hear(
        self, kind: FrameKind, body: bytes, link: bytes = b"1", now: float = 0.0, **fields: object
    ) -> Write | None:
        ends = (bytes.fromhex(LAYOUT.fingerprint), SENDER, bytes.fromhex(RECEIVER))
        header = FrameHeader(kind, *ends, bytes.fromhex(TRANSFER), 1)
        header = replace(header, body_bytes=len(body), **fields)  # type: ignore[arg-type]
        return self.core.received(link, [seal(header, body), body], now)

    def ask_credit(self, link: bytes = b"1") -> None:
        self.hear(FrameKind.CREDIT, encode_credit(0), link)

    def fill(self, first: int = 0, n: int = 16, link: bytes = b"1") -> Write | None:
        return self.hear(FrameKind.FILL, bytes(n * ROW_BYTES), link, first_token=first, num_tokens=n)

    def told(self) -> list[object]:
        """The outbox, emptied: replies as (link, kind, what they say)."""
        told = [said(item) if isinstance(item, Reply) else item for item in self.core.outbox]
        self.core.outbox.clear()
        return told


def said(reply: Reply) -> tuple[bytes, str, object]:
    header = FrameHeader.decode(reply.header)
    match header.kind:
        case FrameKind.CREDIT:
            return reply.link, "CREDIT", decode_credit(reply.body)
        case FrameKind.ACK:
            return reply.link, "ACK", [FrameKind(name.kind).name for name in Acks.decode(reply.body).names]
        case _:
            return reply.link, header.kind.name, Abort.decode(reply.body).cause


def test_rows_are_written_by_the_driver_and_acknowledged_after_that() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.ask_credit()
    assert receiving.told() == [(b"1", "CREDIT", 16 * 2**20)]
    write = receiving.fill()
    assert write is not None
    assert (write.accept.place, write.accept.gaps) == (("latent", 0), ((0, 16),))
    assert receiving.told() == []
    receiving.core.written(write, intact=True)
    receiving.core.tick(0.0)
    assert receiving.told() == [(b"1", "ACK", ["FILL"])]


def test_a_damaged_body_changes_nothing() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.ask_credit()
    write = receiving.fill()
    assert write is not None
    receiving.told()
    receiving.core.written(write, intact=False)
    told = receiving.told()
    assert told[-1] == (b"1", "ABORT", "bad_checksum")
    assert [change.transfer.state.value for change in receiving.states] == ["RESERVED"]
    assert receiving.core.counters == {"refused.bad_checksum": 1}


def test_a_claim_is_reported_once_and_its_commit_acknowledged_after_the_rows() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.ask_credit()
    receiving.told()
    receiving.hear(FrameKind.COMMIT, COMMIT)
    assert receiving.told() == []
    write = receiving.fill()
    assert write is not None
    receiving.core.written(write, intact=True)
    assert receiving.told() == [ClaimedTransfer(TRANSFER, "request", (Token(1),))]
    receiving.core.tick(0.0)
    assert receiving.told() == [(b"1", "ACK", ["FILL", "COMMIT"])]
    receiving.hear(FrameKind.COMMIT, COMMIT)
    receiving.core.tick(0.0)
    assert receiving.told() == [(b"1", "ACK", ["COMMIT"])]


def test_a_transfer_cancelled_while_its_rows_are_written_takes_them_no_more() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.ask_credit()
    write = receiving.fill()
    assert write is not None
    assert receiving.core.cancel(TRANSFER, "client left", 0.0)
    receiving.told()
    receiving.core.written(write, intact=True)
    assert receiving.told()[-1] == (b"1", "ABORT", "late")
    assert receiving.states[-1].transfer.state.value == "ABORTED"


def test_a_cancel_tells_the_sender_after_the_acks_before() -> None:
    receiving = Receiving()
    receiving.reserve((Extent("latent", 0, 0, 32),))
    receiving.ask_credit()
    write = receiving.fill()
    assert write is not None
    receiving.core.written(write, intact=True)
    receiving.told()
    receiving.core.cancel(TRANSFER, "client left", 0.0)
    assert receiving.told() == [(b"1", "ACK", ["FILL"]), (b"1", "ABORT", "client left")]
    assert not receiving.core.cancel(TRANSFER, "again", 0.0)


def test_deadlines_are_told_and_kept() -> None:
    receiving = Receiving()
    assert receiving.core.tick(0.0) is None
    receiving.reserve(deadline=7.0)
    receiving.reserve(transfer_id="dd" * 16, deadline=5.0)
    assert receiving.core.tick(0.0) == 5.0
    assert receiving.core.rearm("dd" * 16, 2, 9.0) == LATENT
    assert receiving.core.tick(5.0) == 7.0
    assert receiving.told() == []
    assert receiving.core.tick(7.0) == 9.0
    (failed,) = receiving.told()
    assert isinstance(failed, FailedTransfer)
    assert (failed.transfer_id, failed.reason, failed.is_ended) == (TRANSFER, "fill_deadline", True)
    receiving.core.tick(9.0)
    assert receiving.core.tick(9.0) == 7.0 + TOMBSTONE_S
    assert receiving.core.tick(9.0 + TOMBSTONE_S) is None


def test_a_sender_that_gives_up_leaves_the_reservation_and_one_that_finished_ends_it() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.ask_credit()
    receiving.told()
    receiving.hear(FrameKind.ABORT, Abort("prefill died").encode())
    (failed,) = receiving.told()
    assert isinstance(failed, FailedTransfer)
    assert (failed.is_ended, failed.finished, failed.missing) == (False, False, LATENT)
    receiving.core.rearm(TRANSFER, 2, 10.0)
    receiving.hear(FrameKind.ABORT, Abort("stop", finished=True).encode(), attempt=2)
    (finished,) = receiving.told()
    assert isinstance(finished, FailedTransfer)
    assert (finished.is_ended, finished.finished) == (True, True)
    assert receiving.core.counters == {"failed": 1, "finished": 1}


def test_credit_is_given_back_when_a_quarter_of_it_is_owed() -> None:
    receiving = Receiving(credit_bytes=64 * ROW_BYTES)
    receiving.reserve(extents(0, 32))
    receiving.ask_credit()
    receiving.told()
    for first in (0, 8):
        write = receiving.fill(first, 8)
        assert write is not None
        receiving.core.written(write, intact=True)
    (answer,) = list(receiving.core.outbox)
    assert isinstance(answer, Reply)
    acks = Acks.decode(answer.body)
    assert (len(acks.names), acks.credit_bytes) == (2, 16 * ROW_BYTES)


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_link_too_many_waits_for_word_of_those_that_may_be_gone(is_lost: bool) -> None:
    receiving = Receiving(max_peers=1)
    receiving.ask_credit(b"1")
    receiving.told()
    receiving.ask_credit(b"2")
    assert receiving.told() == [(b"1", "CREDIT", 0)], "what shows whether it is there"
    if is_lost:
        receiving.core.not_sent(b"1", is_lost=True)
    receiving.core.tick(0.0)
    (answer,) = receiving.told()
    assert answer == ((b"2", "CREDIT", 16 * 2**20) if is_lost else (b"2", "ABORT", "too_many_peers"))


def test_a_link_that_does_not_read_is_counted_and_kept() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.ask_credit()
    receiving.core.not_sent(b"1", is_lost=False)
    assert receiving.fill() is not None
    receiving.core.not_sent(b"1", is_lost=True)
    assert receiving.fill() is None
    assert receiving.core.counters == {"dropped.slow_link": 1, "dropped.lost_link": 1, "refused.no_credit": 1}


def test_what_broke_is_recorded_and_answered() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.ask_credit()
    receiving.told()
    body = bytes(16 * ROW_BYTES)
    ends = (bytes.fromhex(LAYOUT.fingerprint), SENDER, bytes.fromhex(RECEIVER))
    header = FrameHeader(FrameKind.FILL, *ends, bytes.fromhex(TRANSFER), 1, num_tokens=16, body_bytes=len(body))
    receiving.core.failed(b"1", [seal(header, body), body], "RuntimeError('memory')")
    assert receiving.told() == [(b"1", "ABORT", "internal")]
    assert receiving.core.counters == {"refused.internal": 1}


def test_every_open_transfer_can_be_told_anew() -> None:
    receiving = Receiving()
    receiving.reserve()
    receiving.reserve(transfer_id="dd" * 16)
    receiving.states.clear()
    receiving.core.restate()
    assert [(change.transfer.transfer_id, change.previous) for change in receiving.states] == [
        (TRANSFER, None),
        ("dd" * 16, None),
    ]
