"""Ownership records as JSON, hashes and packed bytes. What a store returns is checked field by field, never trusted."""

import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from isthmus.kv.layout import DTYPE_BYTES
from kv_transfer.counters import Counters
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.ownership.store import (
    BLOCK_HASH_BYTES,
    MAX_BLOCK_HASHES,
    SEQUENCE_BYTES,
    BlockSnapshot,
    HandoffRecord,
    Stamp,
    WorkerRecord,
)

MAX_RECORD_BYTES = 64 * 2**10
MAX_ATTEMPT = 2**32 - 1  # as frames and messages carry it
_SEQUENCE = struct.Struct("<Q")
_HEX = frozenset("0123456789abcdef")
_WORKER = TypeAdapter(WorkerRecord)

Raw = TypeVar("Raw")
Record = TypeVar("Record")


class BadRecord(Exception):
    """A stored value that no version of ours wrote."""


def read_record(kind: str, decode: Callable[[Raw], Record], raw: Raw | None, counters: Counters) -> Record | None:
    """None for no value, and for one that makes no sense, which is counted as `bad_record.{kind}`."""
    try:
        return None if raw is None else decode(raw)
    except BadRecord:
        counters.add(f"bad_record.{kind}")
        return None


def encode_worker(record: WorkerRecord) -> bytes:
    return _WORKER.dump_json(record)


def decode_worker(raw: bytes, incarnation: str) -> WorkerRecord:
    """Raises BadRecord. The record must speak of the incarnation it is filed under."""
    if len(raw) > MAX_RECORD_BYTES:
        raise BadRecord("too long")
    try:
        record = _WORKER.validate_json(raw, strict=True)
    except ValidationError as error:
        raise BadRecord(str(error)) from error
    if check_incarnation(record.incarnation) != incarnation:
        raise BadRecord("filed under another incarnation")
    dtypes = {plane.dtype for plane in record.layout.planes}
    if record.role not in ("prefill", "decode") or not dtypes <= DTYPE_BYTES.keys():
        raise BadRecord("a role or dtype of no version of ours")
    if not all(0 <= number < 2**53 for number in _numbers(_WORKER.dump_python(record))):
        raise BadRecord("a count or span below zero or beyond reason")
    return record


def read_workers(raw: Iterable[tuple[str, bytes]], counters: Counters) -> list[WorkerRecord]:
    """Those that make sense, of values by incarnation."""
    found = (read_record("worker", partial(decode_worker, incarnation=name), value, counters) for name, value in raw)
    return [record for record in found if record is not None]


def encode_blocks(snapshot: BlockSnapshot) -> bytes:
    """Sequence as little-endian uint64, then the hashes. Raises ValueError beyond the bounds."""
    if len(snapshot.hashes) > MAX_BLOCK_HASHES or any(len(name) != BLOCK_HASH_BYTES for name in snapshot.hashes):
        raise ValueError(f"at most {MAX_BLOCK_HASHES} hashes of {BLOCK_HASH_BYTES} bytes")
    return _SEQUENCE.pack(snapshot.sequence) + b"".join(snapshot.hashes)


def decode_blocks(raw: bytes) -> BlockSnapshot:
    num_hashes, rest = divmod(len(raw) - _SEQUENCE.size, BLOCK_HASH_BYTES)
    if rest or not 0 <= num_hashes <= MAX_BLOCK_HASHES:
        raise BadRecord("not a sequence and whole hashes")
    places = range(_SEQUENCE.size, len(raw), BLOCK_HASH_BYTES)
    return BlockSnapshot(_SEQUENCE.unpack_from(raw)[0], tuple(raw[at : at + BLOCK_HASH_BYTES] for at in places))


def decode_stamp(head: bytes, num_bytes: int) -> Stamp:
    """Of a stored snapshot, from its first SEQUENCE_BYTES and its length."""
    return int.from_bytes(head[:SEQUENCE_BYTES], "little"), num_bytes


def encode_handoff(record: HandoffRecord) -> dict[bytes, bytes]:
    """The fields of the stored hash, but for its time to live."""
    fields = {
        "state": record.state.value,
        "request_id": record.request_id,
        "decode": record.decode,
        "prefill": record.prefill or "",
        "attempt": str(record.attempt),
    }
    return {name.encode(): value.encode() for name, value in fields.items()}


def decode_handoff(raw: Mapping[bytes, bytes], transfer_id: str) -> HandoffRecord:
    """Raises BadRecord. Fields that are not a record's are passed over."""
    if sum(len(name) + len(value) for name, value in raw.items()) > MAX_RECORD_BYTES:
        raise BadRecord("too long")
    try:
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        return HandoffRecord(
            transfer_id=transfer_id,
            request_id=fields["request_id"],
            decode=check_incarnation(fields["decode"]),
            prefill=check_incarnation(fields["prefill"]) if fields["prefill"] else None,
            attempt=_check_attempt(fields["attempt"]),
            state=HandoffState(fields["state"]),
        )
    except (KeyError, ValueError) as error:
        raise BadRecord(str(error)) from error


def decode_stream(raw: bytes) -> str:
    try:
        return check_incarnation(raw.decode())
    except ValueError as error:
        raise BadRecord(str(error)) from error


def check_incarnation(text: str) -> str:
    """The text itself. Raises BadRecord."""
    if len(text) != 32 or not _HEX.issuperset(text):
        raise BadRecord("an incarnation is 32 hex digits")
    return text


def _check_attempt(text: str) -> int:
    """Raises BadRecord."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_ATTEMPT)) and int(text) <= MAX_ATTEMPT):
        raise BadRecord("an attempt is a whole number of 32 bits")
    return int(text)


def _numbers(value: object) -> list[float]:
    """Every number in nested dictionaries and sequences."""
    found: list[float] = []
    unread = [value]
    while unread:
        item = unread.pop()
        if isinstance(item, int | float):
            found.append(item)
        elif isinstance(item, dict):
            unread += cast("dict[str, object]", item).values()
        elif isinstance(item, list | tuple):
            unread += cast("list[object]", item)
    return found
