"""Bytes that betray a wrong read or write: 0xFF everywhere is NaN in fp32, bf16 and fp16."""

POISON = 0xFF


def poison(buffer: bytearray | memoryview) -> None:
    """Fills a destination, a view of single bytes, before the code under test writes it."""
    buffer[:] = bytes([POISON]) * len(buffer)


def is_poison(buffer: bytes | bytearray | memoryview) -> bool:
    """Whether no byte was written: use on what must stay untouched."""
    return bytes(buffer) == bytes([POISON]) * len(buffer)


def first_poison(buffer: bytes | bytearray | memoryview, *, run: int = 4) -> int | None:
    """Where `run` poisoned bytes stand together, or None: use on what must have been written completely."""
    at = bytes(buffer).find(bytes([POISON]) * run)
    return None if at < 0 else at
