"""The sending core alone: what it sends, when it wants to be called, and when a transfer is over."""

from dataclasses import dataclass, field

import pytest

from isthmus.ledger import Ledger
from isthmus.testing.manual_clock import ManualClock
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.frames import FrameHeader, FrameKind, FrameName, seal
from kv_transfer.messages import Abort, Acks, encode_credit
from kv_transfer.outgoing import AbortTransfer, AddRows, CommitTransfer, OpenTransfer, TransferOutcome
from kv_transfer.sender_core import SenderCore
from kv_transfer.sender_options import SenderOptions
from kv_transfer.wire import LinkLost
from tests.kv_transfer.world import LAYOUT, Pool, extents

SENDER, RECEIVER = "aa" * 16, "bb" * 16
ROW_BYTES = LAYOUT.plane("latent").row_bytes
WINDOW = 64 * ROW_BYTES
NEIGHBOURS, SCATTERED = (4, 5), (9, 3)  # block tables: sent from the pool, or from staging


@dataclass(eq=False)
class Reading:
    done: bool = False


@dataclass(eq=False)
class RecordingWire:
    """Keeps what is sent; reads no body to its end unless the test says so."""

    fails: bool = False
    sent: list[FrameHeader] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    is_closed: bool = False

    def send(self, header: bytes, body: bytes) -> None:
        if self.fails:
            raise LinkLost("cannot send: full")
        self.sent.append(FrameHeader.decode(header))

    def send_rows(self, header: bytes, body: object) -> Reading:
        self.send(header, b"")
        self.readings.append(Reading())
        return self.readings[-1]

    def close(self) -> None:
        self.is_closed = True

    def kinds(self) -> list[str]:
        return [header.kind.name for header in self.sent]


class Sending:
    """A core, the wires it opened, and the outcomes of its transfers by their numbers."""

    def __init__(self, **options: float):
        self.wires: dict[str, RecordingWire] = {}
        self.outcomes: dict[int, list[TransferOutcome]] = {}
        settings = SenderOptions(staging_bytes=4 * 4096, max_frame_bytes=16 * ROW_BYTES, **options)  # type: ignore[arg-type]
        self.core = SenderCore(bytes.fromhex(SENDER), Pool().memory, Ledger(ManualClock()), self._open_wire, settings)

    def _open_wire(self, endpoint: str) -> RecordingWire:
        if endpoint == "nowhere":
            raise LinkLost("cannot connect: nowhere")
        self.wires[endpoint] = RecordingWire(fails=endpoint == "full")
        return self.wires[endpoint]

    def open(self, number: int, endpoint: str = "d1", table: tuple[int, ...] = NEIGHBOURS, now: float = 0.0) -> None:
        target = TransferTarget(f"{number:032x}", 1, endpoint, RECEIVER, LAYOUT.fingerprint, extents(0, 32))
        heard = self.outcomes.setdefault(number, [])
        self.core.obey(OpenTransfer(number, target, table, "request", heard.append), now)

    def rows(self, number: int, first: int = 0, n: int = 32, now: float = 0.0) -> None:
        self.core.obey(AddRows(number, Extent("latent", 0, first, n)), now)

    def everything(self, number: int, now: float = 0.0) -> None:
        for extent in extents(0, 32):
            self.core.obey(AddRows(number, extent), now)
        self.core.obey(CommitTransfer(number, (Token(1),)), now)

    def answer(self, kind: FrameKind, body: bytes, endpoint: str = "d1", now: float = 0.0, **fields: object) -> None:
        ends = (bytes.fromhex(LAYOUT.fingerprint), bytes.fromhex(RECEIVER), bytes.fromhex(SENDER))
        header = FrameHeader(kind, *ends, body_bytes=len(body), **fields)  # type: ignore[arg-type]
        self.core.answered(self.wires[endpoint], [seal(header, body), body], now)

    def grant(self, num_bytes: int = WINDOW, endpoint: str = "d1", now: float = 0.0) -> None:
        self.answer(FrameKind.CREDIT, encode_credit(num_bytes), endpoint, now)

    def ack(self, *frames: FrameHeader, credit: int = 0, now: float = 0.0) -> None:
        self.answer(FrameKind.ACK, Acks(credit, tuple(frame.name for frame in frames)).encode(), now=now)


def commit_name(number: int) -> FrameName:
    return FrameName(FrameKind.COMMIT.value, number.to_bytes(16), 1)


def fills(wire: RecordingWire) -> list[FrameHeader]:
    return [header for header in wire.sent if header.kind is FrameKind.FILL]


def test_nothing_but_a_question_for_credit_leaves_before_it_is_answered() -> None:
    sending = Sending()
    sending.open(1)
    sending.rows(1)
    assert sending.core.turn(0.0) == 5.0, "it waits for an answer from then on"
    assert sending.wires["d1"].kinds() == ["CREDIT"]
    sending.grant()
    sending.core.turn(0.1)
    assert [(fill.first_token, fill.num_tokens) for fill in fills(sending.wires["d1"])] == [(0, 16), (16, 16)]


def test_bytes_without_an_answer_never_exceed_the_credit() -> None:
    sending = Sending()
    sending.open(1)
    sending.everything(1)
    sending.grant(20 * ROW_BYTES)
    wire, answered, now = sending.wires["d1"], 0, 0.0
    while "COMMIT" not in wire.kinds():
        sending.core.turn(now)
        under_way = fills(wire)[answered:]
        assert sum(fill.body_bytes for fill in under_way) <= 20 * ROW_BYTES
        sending.ack(*under_way, credit=sum(fill.body_bytes for fill in under_way), now=now)
        answered += len(under_way)
        now += 0.01
        assert now < 1, "it stopped sending"


def test_the_commit_follows_every_row_and_its_ack_ends_the_transfer_once() -> None:
    sending = Sending()
    sending.open(1)
    sending.grant(10 * WINDOW)
    sending.everything(1)
    while sending.core.turn(0.0) == 0.0:
        pass
    wire = sending.wires["d1"]
    assert wire.kinds()[0] == "CREDIT"
    assert wire.kinds()[-1] == "COMMIT"
    sending.ack(*fills(wire), now=2.0)
    assert sending.outcomes[1] == []
    done = Acks(0, (commit_name(1),)).encode()
    sending.answer(FrameKind.ACK, done)
    sending.answer(FrameKind.ACK, done)
    (outcome,) = sending.outcomes[1]
    assert (outcome.acked, outcome.frames, outcome.last_ack_ns) == (True, len(fills(wire)), 2_000_000_000)


def test_transfers_of_a_link_take_turns() -> None:
    sending = Sending()
    for number in (1, 2):
        sending.open(number)
        sending.rows(number)
    sending.grant()
    sending.core.turn(0.0)
    numbers = [int.from_bytes(fill.transfer) for fill in fills(sending.wires["d1"])]
    assert numbers == [1, 2, 1, 2]


def test_a_burst_has_an_end_and_asks_for_another_at_once() -> None:
    sending = Sending()
    sending.open(1)
    sending.grant(10 * WINDOW)
    sending.everything(1)
    assert sending.core.turn(3.0) == 3.0
    assert len(sending.wires["d1"].sent) == 1 + 8


def test_what_a_transfer_that_has_ended_is_told_changes_nothing() -> None:
    sending = Sending()
    sending.open(1)
    sending.core.obey(AbortTransfer(1, "cancelled"), 0.0)
    sending.everything(1)
    sending.core.obey(AbortTransfer(1, "again"), 0.0)
    sending.core.turn(0.0)
    assert [outcome.failure for outcome in sending.outcomes[1]] == ["cancelled"]
    assert sending.wires["d1"].kinds() == ["CREDIT", "ABORT"]


@pytest.mark.parametrize("endpoint", ["nowhere", "full"])
def test_an_endpoint_that_cannot_be_reached_fails_the_transfer_at_once(endpoint: str) -> None:
    sending = Sending()
    sending.open(1, endpoint)
    (outcome,) = sending.outcomes[1]
    assert outcome.failure.startswith("cannot")
    assert all(wire.is_closed for wire in sending.wires.values())
    assert sending.core.turn(0.0) is None


def test_a_lost_wire_fails_its_transfers_and_no_others() -> None:
    sending = Sending()
    sending.open(1, "d1")
    sending.open(2, "d2")
    sending.core.lost(sending.wires["d1"], "connection lost (closed)", 1.0)
    assert [outcome.failure for outcome in sending.outcomes[1]] == ["connection lost (closed)"]
    assert sending.outcomes[2] == []
    sending.grant(endpoint="d2")
    sending.core.lost(sending.wires["d1"], "again", 1.0)
    sending.rows(2)
    sending.core.turn(1.0)
    assert fills(sending.wires["d2"])


def test_blocks_stay_borrowed_until_the_closed_wire_has_let_go() -> None:
    sending = Sending()
    sending.open(1)
    sending.grant()
    sending.rows(1)
    sending.core.turn(0.0)
    wire = sending.wires["d1"]
    sending.core.lost(wire, "gone", 1.0)
    assert sending.outcomes[1] == []
    assert sending.core.turn(1.0) == pytest.approx(1.005), "it looks again soon"
    for reading in wire.readings:
        reading.done = True
    assert sending.core.turn(1.1) is None
    assert [outcome.failure for outcome in sending.outcomes[1]] == ["gone"]


def test_closing_reports_what_wires_still_read_when_they_are_closed() -> None:
    sending = Sending()
    sending.open(1)
    sending.open(2, table=SCATTERED)
    sending.grant()
    sending.rows(1, first=8, n=16)  # of two blocks
    sending.rows(2, first=8, n=16)
    sending.core.turn(0.0)
    sending.core.fail_all("sender_closed", 0.0)
    assert [len(sending.outcomes[number]) for number in (1, 2)] == [0, 1], "staged rows are copies"
    sending.core.wires_closed()
    assert [len(sending.outcomes[number]) for number in (1, 2)] == [1, 1]


def test_full_staging_waits_and_sends_again_after_an_answer() -> None:
    sending = Sending()
    for number in range(5):  # each frame takes a page of the staging's four
        sending.open(number, table=SCATTERED)
        sending.rows(number, first=8, n=16)  # of two blocks
    sending.grant(10 * WINDOW)
    sending.core.turn(0.0)
    first = fills(sending.wires["d1"])
    assert len(first) == 4
    sending.ack(first[0])
    sending.core.turn(0.0)
    assert len(fills(sending.wires["d1"])) == 5


def test_deadlines_are_told_and_kept() -> None:
    sending = Sending(ack_timeout_s=2.0, idle_link_s=10.0)
    sending.open(1, now=1.0)
    assert sending.core.turn(1.0) is None, "an open transfer without rows waits for its owner"
    sending.rows(1, now=3.0)
    assert sending.core.turn(3.0) == 5.0
    assert sending.core.turn(4.9) == 5.0
    assert sending.core.turn(5.0) is None
    assert [outcome.failure for outcome in sending.outcomes[1]] == ["no answer"]
    sending.open(2, now=20.0)
    sending.core.obey(AbortTransfer(2, "cancelled"), 21.0)
    assert sending.core.turn(21.0) == 31.0
    sending.core.turn(31.0)
    assert sending.wires["d1"].is_closed


def test_a_commit_without_an_ack_fails_and_the_receiver_is_told() -> None:
    sending = Sending(ack_timeout_s=2.0)
    sending.open(1)
    sending.grant(10 * WINDOW)
    sending.everything(1)
    while sending.core.turn(1.0) == 1.0:
        pass
    sending.ack(*fills(sending.wires["d1"]), now=4.0)
    assert sending.core.turn(4.0) == 6.0
    sending.core.turn(6.0)
    assert [outcome.failure for outcome in sending.outcomes[1]] == ["the commit was not acknowledged"]
    assert sending.wires["d1"].kinds()[-1] == "ABORT"


def test_an_answer_of_somebody_else_ends_the_link() -> None:
    sending = Sending()
    sending.open(1)
    body = encode_credit(100)
    header = FrameHeader(FrameKind.CREDIT, b"f" * 16, b"x" * 16, bytes.fromhex(SENDER), body_bytes=len(body))
    sending.core.answered(sending.wires["d1"], [seal(header, body), body], 0.0)
    assert [outcome.failure for outcome in sending.outcomes[1]] == ["bad answer: of somebody else"]


def test_a_refused_question_for_credit_ends_the_link_and_a_refused_frame_its_transfer() -> None:
    sending = Sending()
    sending.open(1)
    sending.open(2)
    sending.grant()
    sending.rows(1)
    sending.core.turn(0.0)
    refusal = Abort("out_of_range", refused=FrameKind.FILL).encode()
    refused = fills(sending.wires["d1"])[0]
    sending.answer(FrameKind.ABORT, refusal, **named(refused))
    assert sending.core.counters["refused_by_peer.out_of_range"] == 1
    assert sending.outcomes[1] == [], "another frame of it is still read"
    for fill in fills(sending.wires["d1"])[1:]:
        sending.ack(fill)
    assert [outcome.failure for outcome in sending.outcomes[1]] == ["refused: out_of_range"]
    sending.answer(FrameKind.ABORT, Abort("too_many_peers", refused=FrameKind.CREDIT).encode())
    assert [outcome.failure for outcome in sending.outcomes[2]] == ["refused: too_many_peers"]


def named(frame: FrameHeader) -> dict[str, object]:
    _, transfer, attempt, plane, layer, first_token, num_tokens = frame.name
    place = {"plane": plane, "layer": layer, "first_token": first_token, "num_tokens": num_tokens}
    return {"transfer": transfer, "attempt": attempt, **place}
