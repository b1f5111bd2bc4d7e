"""The published known-answer vectors of Philox4x32-10 (Random123), and the uniform made from it."""

import pytest

from isthmus.engine.philox import UNIFORM_BITS, philox4x32, uniform_bits

VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == words


def test_the_uniform_is_the_first_word_of_seed_and_index() -> None:
    seed, index = 0x299F31D0A4093822, 7
    assert uniform_bits(seed, index) == philox4x32((7, 0, 0, 0), (0xA4093822, 0x299F31D0))[0] >> 8
    assert uniform_bits(0, 0) == 0x6627E8


def test_uniforms_are_uniform_over_seeds_and_over_indexes() -> None:
    over_seeds = [uniform_bits(seed, 0) for seed in range(4000)]
    for numbers in (over_seeds, [uniform_bits(2**64 - 1, index) for index in range(4000)]):
        counts = [0] * 20
        for number in numbers:
            assert 0 <= number < 1 << UNIFORM_BITS
            counts[number * 20 >> UNIFORM_BITS] += 1
        assert sum((count - 200) ** 2 / 200 for count in counts) < 52  # chi-square, 19 degrees: p > 7e-5
