"""The wire: what is encoded comes back, what is not ours is refused by name, and nothing else ever happens."""

import struct
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.types import Extent, Token
from kv_transfer import messages
from kv_transfer.frames import (
    HEADER_BYTES,
    MAX_BODY_BYTES,
    BadFrame,
    FrameHeader,
    FrameKind,
    FrameName,
    Refusal,
    is_intact,
    seal,
)
from kv_transfer.messages import Abort, Acks, Commit
from tests.kv_transfer.world import LAYOUT

ids = st.binary(min_size=16, max_size=16)
u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
headers = st.builds(
    FrameHeader,
    kind=st.sampled_from(FrameKind),
    fingerprint=ids,
    sender=ids,
    receiver=ids,
    transfer=ids,
    attempt=u32,
    plane=u16,
    layer=u16,
    first_token=u32,
    num_tokens=u32,
)


@given(headers, st.binary(max_size=2000))
def test_a_sealed_frame_comes_back_and_is_intact(header: FrameHeader, body: bytes) -> None:
    header = replace(header, body_bytes=len(body))
    raw = seal(header, body)
    decoded = FrameHeader.decode(raw)
    assert len(raw) == HEADER_BYTES
    assert replace(decoded, checksum=header.checksum) == header
    assert is_intact(raw, body)


@given(headers, st.binary(min_size=1, max_size=500), st.data())
def test_one_flipped_bit_anywhere_breaks_the_seal(header: FrameHeader, body: bytes, data: st.DataObject) -> None:
    frame = bytearray(seal(replace(header, body_bytes=len(body)), body) + body)
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8
    assert not is_intact(frame[:HEADER_BYTES], frame[HEADER_BYTES:])


@given(st.one_of(st.binary(max_size=300), st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES)))
def test_random_bytes_are_refused_or_decoded_never_worse(raw: bytes) -> None:
    with suppress(BadFrame):
        FrameHeader.decode(raw)


@given(st.binary(min_size=HEADER_BYTES - 6, max_size=HEADER_BYTES - 6))
def test_random_fields_behind_a_right_start_are_refused_or_decoded(rest: bytes) -> None:
    with suppress(BadFrame):
        assert FrameHeader.decode(b"ISKV\x02\x00" + rest).body_bytes <= MAX_BODY_BYTES


def test_each_wrong_field_has_its_name() -> None:
    good = FrameHeader(FrameKind.FILL, bytes(16), bytes(16), bytes(16)).encode()

    def refusal(raw: bytes) -> Refusal:
        with pytest.raises(BadFrame) as raised:
            FrameHeader.decode(raw)
        return raised.value.refusal

    assert refusal(good[:-1]) is Refusal.MALFORMED
    assert refusal(good + b"\0") is Refusal.MALFORMED
    assert refusal(b"XXXX" + good[4:]) is Refusal.BAD_MAGIC
    assert refusal(good[:4] + struct.pack("<H", 99) + good[6:]) is Refusal.BAD_VERSION
    assert refusal(good[:6] + struct.pack("<H", 99) + good[8:]) is Refusal.BAD_KIND
    assert refusal(good[:24] + struct.pack("<I", MAX_BODY_BYTES + 1) + good[28:]) is Refusal.BAD_BODY


def test_the_header_is_where_the_wire_says() -> None:
    header = FrameHeader(FrameKind.COMMIT, b"f" * 16, b"s" * 16, b"r" * 16, b"t" * 16, 5, 6, 7, 8, 9, 0)
    expected = (
        struct.pack("<4sHHHHIIII", b"ISKV", 2, 2, 6, 7, 5, 8, 9, 0) + b"f" * 16 + b"s" * 16 + b"r" * 16 + b"t" * 16
    )
    assert header.encode() == expected + bytes(16)


@given(
    st.lists(st.builds(Extent, st.sampled_from(["latent", "index"]), u16, u32, u32), max_size=20),
    st.lists(u32, max_size=20),
)
def test_a_commit_comes_back(extents: list[Extent], token_ids: list[int]) -> None:
    tokens = tuple(Token(token_id, -1.5, ((token_id, -1.5), (0, -2.0))) for token_id in token_ids)
    commit = Commit(tokens, tuple(extents))
    assert Commit.decode(commit.encode(LAYOUT), LAYOUT) == commit
    assert Commit.decode(memoryview(commit.encode(LAYOUT)), LAYOUT) == commit


@given(st.binary(max_size=200))
def test_random_bodies_are_refused_or_decoded(body: bytes) -> None:
    for decode in (partial(Commit.decode, layout=LAYOUT), Abort.decode, Acks.decode, messages.decode_credit):
        with suppress(BadFrame):
            decode(body)


def test_a_commit_that_claims_a_billion_extents_allocates_nothing() -> None:
    with pytest.raises(BadFrame):
        Commit.decode(struct.pack("<II", 0, 2**30), LAYOUT)
    with pytest.raises(BadFrame):
        Commit.decode(bytes(messages.MAX_COMMIT_BYTES + 1), LAYOUT)


def test_an_abort_keeps_its_cause_within_bounds() -> None:
    body = Abort("x" * 5000, refused=FrameKind.FILL).encode()
    assert len(body) < 256
    assert Abort.decode(body).refused is FrameKind.FILL
    assert Abort.decode(Abort("done", finished=True).encode()) == Abort("done", finished=True)


def test_acks_come_back_with_their_credit() -> None:
    acks = Acks(123, (FrameName(1, b"t" * 16, 2, 3, 4, 5, 6), FrameName(2, b"u" * 16, 1)))
    assert Acks.decode(acks.encode()) == acks
    assert Acks.decode(Acks(0, ()).encode()) == Acks(0, ())
    with pytest.raises(BadFrame):
        Acks.decode(bytes(8 + 34 * (messages.MAX_ACKS + 1)))
