"""Slots: where a position's row lies."""

import numpy as np

from isthmus.kv.slots import CacheShape, slots_at


def test_a_slot_is_the_block_of_the_table_and_the_place_in_it() -> None:
    table = np.array([5, 2, 9])
    positions = np.arange(48)
    expected = [table[position // 16] * 16 + position % 16 for position in positions]
    assert slots_at(table, positions, 16).tolist() == expected


def test_each_row_of_positions_has_a_table_of_its_own() -> None:
    tables = np.array([[3, 1], [0, 2]], dtype=np.int32)
    slots = slots_at(tables, np.array([[17], [0]], dtype=np.int32), 16)
    assert slots.tolist() == [[17], [0]]
    assert slots_at(tables, np.array([[0, 31], [16, 1]]), 16).tolist() == [[48, 31], [32, 1]]


def test_a_slot_past_31_bits_is_whole() -> None:
    table = np.array([2**30], dtype=np.int32)
    assert slots_at(table, np.array([63], dtype=np.int32), 64).tolist() == [2**36 + 63]


def test_the_zero_slot_follows_the_last_block() -> None:
    assert CacheShape(num_blocks=3, block_size=16).zero_slot == 48
