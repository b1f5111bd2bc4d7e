"""Identities and random bits, from one source that is handed in.

Request ids are UUIDv7; incarnations and transfer ids are 128 random bits as 32 hex digits; seeds are 64 bits.
"""

import os
import secrets
import time
import uuid
from typing import Protocol


class Ids(Protocol):
    """Everything random that a process makes up. Any thread may ask."""

    def request_id(self) -> str:
        """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, then random bits, so ids sort by age."""
        ...

    def incarnation(self) -> str: ...

    def transfer_id(self) -> str: ...

    def seed(self) -> int:
        """64 bits, for requests that name none."""
        ...

    def fraction(self) -> float:
        """Uniform in [0, 1): spreads retries."""
        ...


class SystemIds:
    """From the operating system's random source."""

    def request_id(self) -> str:
        milliseconds = time.time_ns() // 1_000_000
        return uuid7(milliseconds, int.from_bytes(os.urandom(10)))

    def incarnation(self) -> str:
        return secrets.token_hex(16)

    def transfer_id(self) -> str:
        return secrets.token_hex(16)

    def seed(self) -> int:
        return secrets.randbits(64)

    def fraction(self) -> float:
        return secrets.randbits(53) / 2**53


def uuid7(milliseconds: int, random_bits: int) -> str:
    """The UUIDv7 of a moment and 80 random bits, of which 74 are used."""
    value = milliseconds << 80 | random_bits
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))
