"""Identities: request ids (UUIDv7), incarnations and transfer ids (128 random bits as 32 hex digits), seeds."""

import os
import secrets
import time
import uuid


def new_request_id() -> str:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random bits, so ids sort by age."""
    milliseconds = time.time_ns() // 1_000_000
    random_bits = int.from_bytes(os.urandom(10))
    value = milliseconds << 80 | random_bits
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def new_incarnation() -> str:
    return secrets.token_hex(16)


def new_transfer_id() -> str:
    return secrets.token_hex(16)


def new_seed() -> int:
    return secrets.randbits(64)
