"""Ownership records as JSON and packed bytes. What comes back from a store is checked field by field, never trusted."""

import json
import struct
from dataclasses import asdict
from typing import Any, cast

from isthmus.kv_layout import DTYPE_BYTES, KvLayout, Plane, PlaneKind
from isthmus.types import BlockCounts
from kv_transfer.handoff import HandoffState
from kv_transfer.ownership import (
    BLOCK_HASH_BYTES,
    MAX_BLOCK_HASHES,
    BlockSnapshot,
    HandoffRecord,
    WorkerLoad,
    WorkerRecord,
)

MAX_RECORD_BYTES = 64 * 2**10
_SEQUENCE = struct.Struct("<Q")
_HEX = frozenset("0123456789abcdef")

Fields = dict[str, Any]


class BadRecord(Exception):
    """A stored value that no version of ours wrote."""


def encode_worker(record: WorkerRecord) -> bytes:
    fields = asdict(record)
    for plane in fields["layout"]["planes"]:
        plane["kind"] = plane["kind"].value
    return json.dumps(fields, separators=(",", ":")).encode()


def decode_worker(raw: bytes, incarnation: str) -> WorkerRecord:
    """Raises BadRecord. The record must speak of the incarnation it is filed under."""
    fields = _parse(raw)
    if _incarnation(_text(fields, "incarnation")) != incarnation:
        raise BadRecord("filed under another incarnation")
    endpoint = fields.get("zmq_endpoint")
    return WorkerRecord(
        incarnation=incarnation,
        role=_one_of(_text(fields, "role"), ("prefill", "decode")),
        name=_text(fields, "name"),
        pid=_count(fields, "pid"),
        grpc_address=_text(fields, "grpc_address"),
        zmq_endpoint=None if endpoint is None else _text(fields, "zmq_endpoint"),
        http_address=_text(fields, "http_address"),
        layout=_layout(_object(fields, "layout")),
        numerics_digest=_text(fields, "numerics_digest"),
        numerics_ingredients=_texts(fields, "numerics_ingredients"),
        model_digest=_text(fields, "model_digest"),
        load=_load(_object(fields, "load")),
        serving=_flag(fields, "serving"),
        state=_text(fields, "state"),
        seconds_since_progress=_seconds(fields, "seconds_since_progress"),
    )


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


def decode_handoff(raw: dict[bytes, bytes], transfer_id: str) -> HandoffRecord:
    try:
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        return HandoffRecord(
            transfer_id=transfer_id,
            request_id=fields["request_id"],
            decode=_incarnation(fields["decode"]),
            prefill=_incarnation(fields["prefill"]) if fields["prefill"] else None,
            attempt=int(fields["attempt"]),
            state=HandoffState(fields["state"]),
        )
    except (KeyError, ValueError) as error:
        raise BadRecord(str(error)) from error


def decode_stream(raw: bytes) -> str:
    try:
        return _incarnation(raw.decode())
    except ValueError as error:
        raise BadRecord(str(error)) from error


def _parse(raw: bytes) -> Fields:
    if len(raw) > MAX_RECORD_BYTES:
        raise BadRecord("too long")
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON") from error
    if not isinstance(fields, dict):
        raise BadRecord("not an object")
    return cast(Fields, fields)


def _incarnation(text: str) -> str:
    if len(text) != 32 or not _HEX.issuperset(text):
        raise BadRecord("an incarnation is 32 hex digits")
    return text


def _object(fields: Fields, name: str) -> Fields:
    value = fields.get(name)
    if not isinstance(value, dict):
        raise BadRecord(f"{name} is no object")
    return cast(Fields, value)


def _text(fields: Fields, name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise BadRecord(f"{name} is no text")
    return value


def _texts(fields: Fields, name: str) -> dict[str, str]:
    values = _object(fields, name)
    return {key: _text(values, key) for key in values}


def _one_of(value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise BadRecord(f"{value[:20]} is none of {allowed}")
    return value


def _count(fields: Fields, name: str) -> int:
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise BadRecord(f"{name} is no count")
    return value


def _flag(fields: Fields, name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool):
        raise BadRecord(f"{name} is no flag")
    return value


def _seconds(fields: Fields, name: str) -> float:
    value = fields.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise BadRecord(f"{name} is no span")
    return float(value)


def _layout(fields: Fields) -> KvLayout:
    planes = fields.get("planes")
    if not isinstance(planes, list):
        raise BadRecord("planes is no list")
    parsed = tuple(_plane(cast(Fields, plane)) for plane in cast(list[object], planes) if isinstance(plane, dict))
    return KvLayout(_text(fields, "model_digest"), parsed, _count(fields, "block_size"), _count(fields, "wire_version"))


def _plane(fields: Fields) -> Plane:
    kind = PlaneKind(_one_of(_text(fields, "kind"), tuple(kind.value for kind in PlaneKind)))
    dtype = _one_of(_text(fields, "dtype"), tuple(DTYPE_BYTES))
    return Plane(_text(fields, "name"), kind, _count(fields, "num_layers"), _count(fields, "row_elements"), dtype)


def _load(fields: Fields) -> WorkerLoad:
    blocks = _object(fields, "blocks")
    names = ("total", "free", "cached", "referenced", "draining")
    counts = BlockCounts(**{name: _count(blocks, name) for name in names})
    return WorkerLoad(counts, _count(fields, "num_streams"), _count(fields, "num_queued"))
