"""Bodies of the small frames. Fill bodies are bare rows; everything here is bounded and parsed without trust."""

import struct
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from isthmus.convert import token_from_proto, token_to_proto
from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, Token
from isthmus.v1 import decode_pb2
from kv_transfer.frames import KINDS, MAX_BODY_BYTES, BadFrame, Buffer, FrameKind, FrameName, Refusal

MAX_COMMIT_BYTES = MAX_BODY_BYTES
MAX_ACKS = 64
_MAX_CAUSE_BYTES = 200

_COMMIT = struct.Struct("<II")  # bytes of the StreamTokens message, number of extents
_EXTENT = struct.Struct("<HHII")  # plane, layer, first token, token count
_ABORT = struct.Struct("<HH")  # kind of the refused frame (0: the transfer as a whole), 1 if the request is finished
_NAME = struct.Struct("<H16sIHHII")  # the fields of a FrameName
_CREDIT = struct.Struct("<Q")  # bytes granted; 0 asks


@dataclass(frozen=True, slots=True)
class Commit:
    """Tokens 0 to k - 1, and the rows of required planes without which decode cannot go on.

    k is 1 unless a stream moves.
    """

    tokens: tuple[Token, ...]
    extents: tuple[Extent, ...]

    def encode(self, layout: KvLayout) -> bytes:
        """May be longer than MAX_COMMIT_BYTES, which no receiver takes."""
        tokens = decode_pb2.StreamTokens(tokens=map(token_to_proto, self.tokens)).SerializeToString()
        extents = (
            _EXTENT.pack(layout.number_of(extent.plane), extent.layer, extent.first_token, extent.num_tokens)
            for extent in self.extents
        )
        return _COMMIT.pack(len(tokens), len(self.extents)) + tokens + b"".join(extents)

    @classmethod
    def decode(cls, body: Buffer, layout: KvLayout) -> "Commit":
        """Raises BadFrame, also for a plane that `layout` does not have."""
        if not _COMMIT.size <= len(body) <= MAX_COMMIT_BYTES:
            raise BadFrame(Refusal.BAD_BODY)
        tokens_bytes, num_extents = _COMMIT.unpack_from(body)
        if _COMMIT.size + tokens_bytes + num_extents * _EXTENT.size != len(body):
            raise BadFrame(Refusal.BAD_BODY)
        extents_at = _COMMIT.size + tokens_bytes
        try:
            tokens = decode_pb2.StreamTokens.FromString(bytes(body[_COMMIT.size : extents_at])).tokens
        except DecodeError as error:
            raise BadFrame(Refusal.BAD_BODY) from error
        numbered = list(_EXTENT.iter_unpack(body[extents_at:]))
        try:
            extents = tuple(Extent(layout.name_of(number), *fields) for number, *fields in numbered)
        except KeyError as error:
            raise BadFrame(Refusal.WRONG_EXTENTS) from error
        return cls(tuple(map(token_from_proto, tokens)), extents)


@dataclass(frozen=True, slots=True)
class Abort:
    """The transfer ends (`refused` is None), or D would not take one frame and names its kind."""

    cause: str
    refused: FrameKind | None = None
    finished: bool = False  # nothing failed: the request ended at token 0

    def encode(self) -> bytes:
        kind = 0 if self.refused is None else self.refused.value
        return _ABORT.pack(kind, self.finished) + self.cause.encode()[:_MAX_CAUSE_BYTES]

    @classmethod
    def decode(cls, body: Buffer) -> "Abort":
        if not _ABORT.size <= len(body) <= _ABORT.size + _MAX_CAUSE_BYTES:
            raise BadFrame(Refusal.BAD_BODY)
        kind, finished = _ABORT.unpack_from(body)
        if kind and kind not in KINDS:
            raise BadFrame(Refusal.BAD_BODY)
        cause = bytes(body[_ABORT.size :]).decode(errors="replace")
        return cls(cause, KINDS.get(kind), bool(finished))


@dataclass(frozen=True, slots=True)
class Acks:
    """Frames accepted since the last answer, in order, and the credit their bodies give back."""

    credit_bytes: int
    names: tuple[FrameName, ...]

    def encode(self) -> bytes:
        assert len(self.names) <= MAX_ACKS, "the receiver answers in bursts"
        return _CREDIT.pack(self.credit_bytes) + b"".join(_NAME.pack(*name) for name in self.names)

    @classmethod
    def decode(cls, body: Buffer) -> "Acks":
        num_names, rest = divmod(len(body) - _CREDIT.size, _NAME.size)
        if rest or not 0 <= num_names <= MAX_ACKS:
            raise BadFrame(Refusal.BAD_BODY)
        names = tuple(FrameName._make(fields) for fields in _NAME.iter_unpack(body[_CREDIT.size :]))
        return cls(_CREDIT.unpack_from(body)[0], names)


def encode_credit(num_bytes: int) -> bytes:
    return _CREDIT.pack(num_bytes)


def decode_credit(body: Buffer) -> int:
    if len(body) != _CREDIT.size:
        raise BadFrame(Refusal.BAD_BODY)
    return _CREDIT.unpack(body)[0]
