"""Bounds on a request's raw bytes before protobuf builds objects of them: parsing holds the event loop.

Also the only place where two inputs can be told from one: a parsed oneof keeps the last.
"""

from collections.abc import Iterator

from isthmus.errors import InvalidRequest

MAX_FIELDS = 64  # top-level occurrences; a proper request has at most eleven
MAX_STOP = 16
MAX_LOGIT_BIAS = 1024
MAX_MESSAGES = 1024
_MAX_SAMPLING_BYTES = 64 << 10
_MAX_ENTRY_BYTES = 4 << 10  # of one entry of `sampling`
# Field numbers of GenerateRequest: the oneof, and what else may be long.
_INPUTS = {3: "prompt", 4: "token_ids", 5: "chat"}
_LONG = {**_INPUTS, 1: "client_request_id", 2: "model", 7: "emitted_token_ids", 11: "tenant"}
_SAMPLING = 6
# What repeats inside of these two: number -> name, most entries. Packed numbers are bounded by bytes instead.
_REPEATED = {
    5: {1: ("chat.messages", MAX_MESSAGES)},
    _SAMPLING: {8: ("sampling.stop", MAX_STOP), 16: ("sampling.logit_bias", MAX_LOGIT_BIAS)},
}
_MAX_NESTED_FIELDS = 4096
_VARINT, _BYTES = 0, 2  # wire types
_FIXED_BYTES = {1: 8, 5: 4}


def check_wire(raw: bytes, max_prompt_bytes: int) -> None:
    """Raises InvalidRequest naming the field that is too large, given twice, or unreadable; its own work is bounded."""
    inputs: set[int] = set()
    num_bytes: dict[int, int] = {}
    for count, (number, start, end) in enumerate(_fields(raw, 0, len(raw), "request"), 1):
        if count > MAX_FIELDS:
            raise InvalidRequest.of("request", f"more than {MAX_FIELDS} fields", "each field once")
        inputs |= {number} & _INPUTS.keys()
        num_bytes[number] = num_bytes.get(number, 0) + end - start
        if num_bytes[number] > max_prompt_bytes and number != _SAMPLING:
            given, allowed = f"{num_bytes[number]} bytes", f"at most {max_prompt_bytes} bytes"
            raise InvalidRequest.of(_LONG.get(number, "request"), given, allowed)
        if number in _REPEATED:
            _check_entries(raw, start, end, number)
        if number == _SAMPLING and end - start > _MAX_SAMPLING_BYTES:
            raise InvalidRequest.of("sampling", f"{end - start} bytes", f"at most {_MAX_SAMPLING_BYTES} bytes")
    if len(inputs) > 1:
        given = " and ".join(_INPUTS[number] for number in sorted(inputs))
        raise InvalidRequest.of("input", given, "one of prompt, token_ids, chat")


def _check_entries(raw: bytes, start: int, end: int, parent: int) -> None:
    """Counts the entries of what repeats in the message in raw[start:end]."""
    name = "sampling" if parent == _SAMPLING else "chat"
    counts = dict.fromkeys(_REPEATED[parent], 0)
    for seen, (number, first, after) in enumerate(_fields(raw, start, end, name)):
        if number in counts:
            counts[number] += 1
            field, most = _REPEATED[parent][number]
            if parent == _SAMPLING and after - first > _MAX_ENTRY_BYTES:
                raise InvalidRequest.of(field, f"{after - first} bytes", f"at most {_MAX_ENTRY_BYTES}")
            if counts[number] > most:
                raise InvalidRequest.of(field, f"more than {most} entries", f"at most {most} entries")
        if seen >= _MAX_NESTED_FIELDS:
            raise InvalidRequest.of(name, f"more than {_MAX_NESTED_FIELDS} fields", "each field as often as it may be")


def _fields(raw: bytes, start: int, end: int, name: str) -> Iterator[tuple[int, int, int]]:
    """(number, start, end of the value) of each field of the message in raw[start:end]."""
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
    return InvalidRequest.of(name, "bytes that are no protobuf message", "a serialised isthmus.v1 request")
