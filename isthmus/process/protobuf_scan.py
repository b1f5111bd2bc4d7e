"""The fields of a serialised protobuf message, found without building objects: bounds can be checked before parsing.

Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from collections.abc import Iterator

from isthmus.errors import InvalidRequest

_VARINT = 0  # wire types
_BYTES = 2
_FIXED_BYTES = {1: 8, 5: 4}


def fields(raw: bytes, start: int, end: int, name: str) -> Iterator[tuple[int, int, int]]:
    """(number, start, end of the value) of each field of the message in raw[start:end]; `name` is what errors call it.

    Raises InvalidRequest for bytes that are no message.
    """
    position = start
    while position < end:
        tag, position = _varint(raw, position, end, name)
        wire_type = tag & 7
        after = end + 1  # of a wire type that protobuf does not have
        if wire_type == _VARINT:
            _, after = _varint(raw, position, end, name)
        elif wire_type == _BYTES:
            length, position = _varint(raw, position, end, name)
            after = position + length
        elif wire_type in _FIXED_BYTES:
            after = position + _FIXED_BYTES[wire_type]
        if after > end:
            raise _unreadable(name)
        yield tag >> 3, position, after
        position = after


def _varint(raw: bytes, position: int, end: int, name: str) -> tuple[int, int]:
    """(value, position after it); at most ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = raw[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _unreadable(name)


def _unreadable(name: str) -> InvalidRequest:
    return InvalidRequest.of(name, "bytes that are no protobuf message", "a serialised message")
