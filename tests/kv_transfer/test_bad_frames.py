"""Whatever comes to the port: refused, counted, answered where possible; other transfers never notice."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import zmq

from isthmus.ids import SystemIds
from isthmus.types import Extent, Token
from kv_transfer.frames import HEADER_BYTES, MAX_BODY_BYTES, FrameHeader, FrameKind, seal
from kv_transfer.messages import Abort, Acks, Commit, decode_credit, encode_credit
from kv_transfer.receiver_events import ClaimedTransfer, ReceiverOptions
from tests.kv_transfer.world import (
    LAYOUT,
    POISON,
    DecodeSide,
    Pool,
    PrefillSide,
    assert_moved,
    extents,
    started_sender,
    wait_until,
)

ROW_BYTES = LAYOUT.planes[0].row_bytes


class Intruder:
    """A DEALER that says whatever it likes."""

    def __init__(self, decode: DecodeSide):
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, 5000)
        self.socket.connect(decode.receiver.endpoint)
        self.incarnation = bytes.fromhex(SystemIds().incarnation())
        self.decode = decode

    def header(self, kind: FrameKind, **fields: object) -> FrameHeader:
        ends = (bytes.fromhex(LAYOUT.fingerprint), self.incarnation, bytes.fromhex(self.decode.incarnation))
        return replace(FrameHeader(kind, *ends), **fields)  # type: ignore[arg-type]

    def say(self, header: FrameHeader, body: bytes) -> None:
        self.socket.send_multipart([seal(replace(header, body_bytes=len(body)), body), body])

    def ask_credit(self) -> int:
        self.say(self.header(FrameKind.CREDIT), encode_credit(0))
        header, body = self.hear()
        assert header.kind is FrameKind.CREDIT
        return decode_credit(body)

    def hear(self) -> tuple[FrameHeader, bytes]:
        raw, body = self.socket.recv_multipart()
        return FrameHeader.decode(raw), body

    def acked(self, num: int = 1) -> list[int]:
        """Kinds of the next frames the receiver accepts."""
        kinds: list[int] = []
        while len(kinds) < num:
            header, body = self.hear()
            assert header.kind is FrameKind.ACK
            kinds += [name.kind for name in Acks.decode(body).names]
        return kinds

    def refused(self) -> str:
        header, body = self.hear()
        while header.kind is FrameKind.ACK:  # credit given back by an earlier refusal
            header, body = self.hear()
        assert header.kind is FrameKind.ABORT
        return Abort.decode(body).cause

    def fill(self, transfer_id: str, extent: Extent, **fields: object) -> tuple[FrameHeader, bytes]:
        body = bytes([1]) * (extent.num_tokens * ROW_BYTES)
        place = {"plane": LAYOUT.number_of(extent.plane), "layer": extent.layer, "first_token": extent.first_token}
        known = {"transfer": bytes.fromhex(transfer_id), "attempt": 1, "num_tokens": extent.num_tokens, **place}
        return replace(self.header(FrameKind.FILL), **{**known, **fields}), body  # type: ignore[arg-type]

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    with DecodeSide() as side:
        yield side


@pytest.fixture
def intruder(decode: DecodeSide) -> Iterator[Intruder]:
    intruder = Intruder(decode)
    yield intruder
    intruder.close()


@pytest.fixture(autouse=True)
def others_never_notice(decode: DecodeSide) -> Iterator[None]:
    """A transfer opened before the attack and finished after it arrives whole."""
    pool, missing = Pool(seed=8), extents(0, 40)
    with closing(started_sender(pool.memory)) as sender:
        sending = PrefillSide(sender, pool).send(decode.reserve([20, 21, 22], missing), [3, 9, 4])
        sending.transfer.rows_ready("latent", 0, 0, 40)
        yield
        assert sending.all_rows(40).commit().outcome().acked
        assert isinstance(decode.next(), ClaimedTransfer)
        assert_moved(pool, [3, 9, 4], decode.pool, [20, 21, 22], missing)


def refusals(decode: DecodeSide, name: str) -> int:
    return decode.receiver.counters.get(f"refused.{name}", 0)


def test_bytes_that_are_not_zeromq(decode: DecodeSide) -> None:
    host, port = decode.receiver.endpoint.removeprefix("tcp://").split(":")
    for junk in (b"\x80\x04\x95pickle.", b"GET / HTTP/1.1\r\n\r\n", random.Random(1).randbytes(5000), b"\xff" * 64):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(junk)


def test_messages_that_are_not_ours(decode: DecodeSide, intruder: Intruder) -> None:
    rng = random.Random(2)
    junk = [
        [b""],
        [b"\x80\x04\x95."],
        [rng.randbytes(HEADER_BYTES)],
        [rng.randbytes(HEADER_BYTES), rng.randbytes(5000)],
        [b"", b"", b"", b""],
        [intruder.header(FrameKind.FILL).encode()],  # no body
        [intruder.header(FrameKind.FILL).encode()[:50], b""],  # cut short
        [b"XXXX" + intruder.header(FrameKind.FILL).encode()[4:], b""],
        [b"ISKV\x63\x00" + bytes(HEADER_BYTES - 6), b""],
    ]
    for parts in junk:
        intruder.socket.send_multipart(parts)
    wait_until(lambda: sum(v for k, v in decode.receiver.counters.items() if k.startswith("refused.")) == len(junk))
    counters = decode.receiver.counters
    assert counters["refused.malformed"] >= 4
    assert counters["refused.bad_magic"] >= 2
    assert counters["refused.bad_version"] == 1


def test_a_body_over_the_limit_ends_the_connection(decode: DecodeSide, intruder: Intruder) -> None:
    assert intruder.ask_credit() > 0
    intruder.socket.send_multipart([intruder.header(FrameKind.FILL).encode(), bytes(MAX_BODY_BYTES + 1)])
    intruder.socket.setsockopt(zmq.RCVTIMEO, 100)
    with pytest.raises(zmq.Again):
        intruder.socket.recv_multipart()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"fingerprint": bytes(16)}, "layout_mismatch"),
        ({"receiver": bytes(16)}, "stale_owner"),
        ({"sender": b"x" * 16}, "wrong_sender"),
        ({"transfer": b"x" * 16}, "unknown_transfer"),
        ({"attempt": 0}, "old_attempt"),
        ({"attempt": 7}, "future_attempt"),
        ({"plane": 7}, "out_of_range"),
        ({"layer": 65535}, "out_of_range"),
        ({"first_token": 2**32 - 1}, "out_of_range"),
        ({"num_tokens": 2**32 - 1}, "out_of_range"),
        ({"num_tokens": 7}, "bad_body"),
        ({"kind": FrameKind.ACK}, "bad_kind"),
        ({"kind": FrameKind.COMMIT}, "bad_body"),
        ({"kind": FrameKind.CREDIT}, "bad_body"),
    ],
)
def test_a_wellformed_frame_with_one_wrong_field(
    decode: DecodeSide, intruder: Intruder, changed: dict[str, object], expected: str
) -> None:
    target = decode.reserve([0, 1], extents(8, 24))
    intruder.ask_credit()
    before = refusals(decode, expected)
    intruder.say(*intruder.fill(target.transfer_id, Extent("latent", 0, 8, 8), **changed))
    assert intruder.refused() == expected
    assert refusals(decode, expected) == before + 1
    assert (decode.pool.rows["latent", 0][:32] == POISON).all()
    assert "handoff.filling" not in [e.event for e in decode.ledger.read() if e.transfer_id == target.transfer_id]


def test_a_damaged_body_is_refused_before_memory_is_touched(decode: DecodeSide, intruder: Intruder) -> None:
    target = decode.reserve([0], extents(0, 16))
    intruder.ask_credit()
    header, body = intruder.fill(target.transfer_id, Extent("latent", 0, 0, 16))
    raw = seal(replace(header, body_bytes=len(body)), body)
    intruder.socket.send_multipart([raw, body[:-1] + b"\2"])
    assert intruder.refused() == "bad_checksum"
    intruder.socket.send_multipart([raw, body[:-1]])
    assert intruder.refused() == "bad_body"
    assert (decode.pool.rows["latent", 0][:16] == POISON).all()


def test_rows_without_credit_are_refused(decode: DecodeSide, intruder: Intruder) -> None:
    target = decode.reserve([0], extents(0, 16))
    intruder.say(*intruder.fill(target.transfer_id, Extent("latent", 0, 0, 16)))
    assert intruder.refused() == "no_credit"
    assert (decode.pool.rows["latent", 0][:16] == POISON).all()


def test_a_replayed_frame_is_acknowledged_again_and_writes_nothing(decode: DecodeSide, intruder: Intruder) -> None:
    target = decode.reserve([0], extents(0, 16, [("latent", 0)]))
    intruder.ask_credit()
    header, body = intruder.fill(target.transfer_id, Extent("latent", 0, 0, 16))
    intruder.say(header, body)
    assert intruder.acked() == [FrameKind.FILL.value]
    decode.pool.rows["latent", 0][:16] = POISON
    intruder.say(header, body)
    assert intruder.acked() == [FrameKind.FILL.value]
    commit = Commit((Token(1),), extents(0, 16, [("latent", 0)])).encode(LAYOUT)
    place = replace(header, kind=FrameKind.COMMIT, first_token=0, num_tokens=0)
    intruder.say(place, commit)
    intruder.say(place, commit)  # of a claimed transfer
    assert intruder.acked(2) == [FrameKind.COMMIT.value] * 2
    intruder.say(header, body)
    assert intruder.acked() == [FrameKind.FILL.value]
    assert (decode.pool.rows["latent", 0][:16] == POISON).all()
    assert decode.next().transfer_id == target.transfer_id
    decode.receiver.release(target.transfer_id)
    intruder.say(header, body)
    assert intruder.refused() == "late"


def test_another_link_cannot_speak_for_the_sender_it_does_not_know(decode: DecodeSide, intruder: Intruder) -> None:
    target = decode.reserve([0], extents(0, 16))
    intruder.ask_credit()
    intruder.say(*intruder.fill(target.transfer_id, Extent("latent", 0, 0, 16)))
    assert intruder.acked() == [FrameKind.FILL.value]
    other = Intruder(decode)
    other.ask_credit()
    other.say(*other.fill(target.transfer_id, Extent("latent", 1, 0, 16)))
    assert other.refused() == "wrong_sender"
    other.close()
    assert (decode.pool.rows["latent", 1][:16] == POISON).all()
    decode.pool.rows["latent", 0][:16] = POISON  # what the first link rightly wrote


def test_a_flood_of_garbage_leaves_the_thread_alive(decode: DecodeSide, intruder: Intruder) -> None:
    rng = random.Random(3)
    good = intruder.header(FrameKind.FILL, transfer=b"x" * 16, num_tokens=3).encode()
    for _ in range(500):
        damaged = bytearray(good)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        intruder.socket.send_multipart([bytes(damaged), rng.randbytes(rng.randint(0, 300))])
    wait_until(lambda: sum(v for k, v in decode.receiver.counters.items() if k.startswith("refused.")) >= 500)
    assert "refused.internal" not in decode.receiver.counters


def test_links_are_bounded_and_the_dead_ones_make_room() -> None:
    with DecodeSide(ReceiverOptions(max_peers=2)) as decode:
        first, second = Intruder(decode), Intruder(decode)
        assert first.ask_credit() > 0
        assert second.ask_credit() > 0
        third = Intruder(decode)
        third.say(third.header(FrameKind.CREDIT), encode_credit(0))
        assert third.refused() == "too_many_peers"
        first.close()
        time.sleep(0.1)
        assert third.ask_credit() > 0
        second.close()
        third.close()
