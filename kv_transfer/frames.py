"""The wire: every ZeroMQ message is [header, body]; the header is fixed, little-endian and covered by the checksum.

offset  size  field
     0     4  magic "ISKV"
     4     2  wire version
     6     2  kind
     8     2  plane
    10     2  layer
    12     4  attempt
    16     4  first token position
    20     4  token count
    24     4  body bytes
    28    16  layout fingerprint
    44    16  incarnation of the frame's sender
    60    16  incarnation of its receiver
    76    16  transfer id (zeros: the frame is about the link)
    92    16  xxh3-128 of the header, this field zeroed, and the body
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import NamedTuple

import xxhash

from isthmus.kv.layout import WIRE_VERSION

MAGIC = b"ISKV"
MAX_BODY_BYTES = 4 * 2**20
NO_TRANSFER = bytes(16)

_HEADER = struct.Struct("<4sHHHHIIII16s16s16s16s16s")
_PLACE = ("plane", "layer", "attempt", "first_token", "num_tokens", "body_bytes")
_AFTER_KIND = (*_PLACE, "fingerprint", "sender", "receiver", "transfer", "checksum")  # FrameHeader's, in wire order
HEADER_BYTES = _HEADER.size
_NO_CHECKSUM = bytes(16)
_COVERED_BYTES = HEADER_BYTES - len(_NO_CHECKSUM)

Buffer = bytes | bytearray | memoryview


class FrameKind(Enum):
    FILL = 1  # P to D: rows of one plane and layer
    COMMIT = 2  # to D: the tokens so far and the extents they rest on
    ABORT = 3  # either way: the transfer ends, or this frame was refused
    ACK = 4  # D to P: names the frames it accepts and grants credit
    CREDIT = 5  # P asks for credit; D grants the first


KINDS = {kind.value: kind for kind in FrameKind}


class Refusal(Enum):
    """Why a frame was refused; the value is the counter's name and travels in the ABORT answer."""

    MALFORMED = "malformed"  # not [header, body], or a header of another size
    BAD_MAGIC = "bad_magic"
    BAD_VERSION = "bad_version"
    BAD_KIND = "bad_kind"
    BAD_BODY = "bad_body"  # length or content differs from what the header says
    BAD_CHECKSUM = "bad_checksum"
    LAYOUT_MISMATCH = "layout_mismatch"
    STALE_OWNER = "stale_owner"  # meant for another incarnation of the receiver
    WRONG_SENDER = "wrong_sender"
    NO_CREDIT = "no_credit"
    TOO_MANY_PEERS = "too_many_peers"
    UNKNOWN_TRANSFER = "unknown_transfer"
    LATE = "late"  # the transfer has ended
    OLD_ATTEMPT = "old_attempt"
    FUTURE_ATTEMPT = "future_attempt"
    OUT_OF_RANGE = "out_of_range"  # plane, layer or positions outside the reservation
    WRONG_EXTENTS = "wrong_extents"  # a commit that rests on other rows than the reservation asked for
    INTERNAL = "internal"


class BadFrame(Exception):
    """A frame that must not be acted on."""

    def __init__(self, refusal: Refusal):
        super().__init__(refusal.value)
        self.refusal = refusal


class FrameName(NamedTuple):
    """Unique among the unanswered frames of a link; COMMIT and ABORT have no place."""

    kind: int  # FrameKind.value
    transfer: bytes
    attempt: int
    plane: int = 0
    layer: int = 0
    first_token: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FrameHeader:
    kind: FrameKind
    fingerprint: bytes
    sender: bytes
    receiver: bytes
    transfer: bytes = NO_TRANSFER
    attempt: int = 0
    plane: int = 0
    layer: int = 0
    first_token: int = 0
    num_tokens: int = 0
    body_bytes: int = 0
    checksum: bytes = _NO_CHECKSUM

    @property
    def transfer_id(self) -> str:
        return self.transfer.hex()

    @property
    def end_token(self) -> int:
        return self.first_token + self.num_tokens

    @property
    def name(self) -> "FrameName":
        """What an answer calls the frame by."""
        place = (self.plane, self.layer, self.first_token, self.num_tokens)
        return FrameName(self.kind.value, self.transfer, self.attempt, *place)

    def encode(self) -> bytes:
        return _HEADER.pack(MAGIC, WIRE_VERSION, self.kind.value, *_values_after_kind(self))

    @classmethod
    def decode(cls, raw: Buffer) -> "FrameHeader":
        """Raises BadFrame; checks only what the header alone can tell."""
        if len(raw) != HEADER_BYTES:
            raise BadFrame(Refusal.MALFORMED)
        magic, version, kind, *values = _HEADER.unpack(raw)
        if magic != MAGIC:
            raise BadFrame(Refusal.BAD_MAGIC)
        if version != WIRE_VERSION:
            raise BadFrame(Refusal.BAD_VERSION)
        if kind not in KINDS:
            raise BadFrame(Refusal.BAD_KIND)
        header = cls(KINDS[kind], **dict(zip(_AFTER_KIND, values, strict=True)))
        if header.body_bytes > MAX_BODY_BYTES:
            raise BadFrame(Refusal.BAD_BODY)
        return header


_values_after_kind = attrgetter(*_AFTER_KIND)


def seal(header: FrameHeader, body: Buffer) -> bytes:
    """The encoded header with the checksum in place. `header.body_bytes` must be the body's length."""
    assert header.body_bytes == len(body), "the header names the body's length"
    covered = header.encode()[:_COVERED_BYTES]
    return covered + _checksum(covered, body)


def is_intact(raw_header: Buffer, body: Buffer) -> bool:
    """Whether the checksum of a received frame holds."""
    covered = bytes(raw_header[:_COVERED_BYTES])
    return _checksum(covered, body) == bytes(raw_header[_COVERED_BYTES:])


def _checksum(covered: bytes, body: Buffer) -> bytes:
    # The streaming form releases the GIL on large bodies and needs no joined copy.
    state = _new_state(covered + _NO_CHECKSUM)
    state.update(body)
    return state.digest()


_new_state: Callable[[bytes], xxhash.xxh3_128] = xxhash.xxh3_128
