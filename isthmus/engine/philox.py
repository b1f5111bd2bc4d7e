"""Philox4x32-10, a counter-based generator: a token's number depends on the seed and the token's index alone.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

UNIFORM_BITS = 24  # as many as fp32 holds exactly


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0 = (p1 >> 32) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = (p0 >> 32) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def uniform_bits(seed: int, index: int) -> int:
    """The uniform of token `index`, as the integer u * 2^24; `seed` is 64 bits, low word first in the key."""
    word = philox4x32((index, 0, 0, 0), (seed & _MASK, seed >> 32 & _MASK))[0]
    return word >> (32 - UNIFORM_BITS)
