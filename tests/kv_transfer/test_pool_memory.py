"""Copies between bodies and blocks, against a row by row definition."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.types import Place
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.staging import Staging
from tests.kv_transfer.world import LAYOUT, NUM_BLOCKS, PLACES, POISON, Pool

tables = st.one_of(
    st.permutations(range(NUM_BLOCKS)).map(lambda ids: ids[:8]),
    st.integers(0, NUM_BLOCKS - 8).map(lambda first: list(range(first, first + 8))),
)


@settings(max_examples=60, deadline=None)
@given(tables, st.data(), st.sampled_from(PLACES))
def test_rows_are_read_and_written_where_the_block_table_says(
    table: list[int], data: st.DataObject, place: Place
) -> None:
    first = data.draw(st.integers(0, 127))
    end = data.draw(st.integers(first + 1, 128))
    source, landing = Pool(seed=1), Pool(POISON)
    body = bytearray((end - first) * LAYOUT.plane(place[0]).row_bytes)
    source.memory.read_rows(place, table, (first, end), body)
    expected = source.rows[place][source.slots(table, first, end)]
    np.testing.assert_array_equal(np.frombuffer(body, np.uint8).reshape(expected.shape), expected)

    view = source.memory.contiguous(place, table, (first, end))
    assert view is None or bytes(view) == bytes(body)

    landing.memory.write_rows(place, table, (first, end), memoryview(bytes(body)))
    slots = landing.slots(table, first, end)
    np.testing.assert_array_equal(landing.rows[place][slots], expected)
    landing.rows[place][slots] = POISON
    assert all((rows == POISON).all() for rows in landing.rows.values())


def test_neighbouring_blocks_are_seen_as_one_run() -> None:
    memory = Pool().memory
    assert memory.contiguous(("latent", 0), [3, 4, 5], (5, 40)) is not None
    assert memory.contiguous(("latent", 0), [3, 5, 4], (5, 40)) is None
    assert memory.contiguous(("latent", 0), [3, 9], (16, 20)) is not None


def test_tables_and_memory_are_checked_at_the_edge() -> None:
    pool = Pool()
    for table in ([NUM_BLOCKS], [-1], [0, 2**40]):
        with pytest.raises(ValueError, match="block ids"):
            pool.memory.check_table(table)
    memory = {place: rows.reshape(-1).data for place, rows in pool.rows.items()}
    with pytest.raises(ValueError, match="reshape"):
        PoolMemory(LAYOUT, memory | {("latent", 0): memoryview(bytearray(1000))})


@given(st.lists(st.integers(1, 40_000), max_size=60), st.randoms())
def test_staging_never_hands_out_a_byte_twice(sizes: list[int], rng: object) -> None:
    staging = Staging(2**20)
    held = []
    for size in sizes:
        slot = staging.acquire(size)
        if held and (slot is None or rng.random() < 0.4):  # type: ignore[attr-defined]
            staging.release(held.pop(rng.randrange(len(held))))  # type: ignore[attr-defined]
        if slot is not None:
            held.append(slot)
        pages = sorted((s.first_page, s.first_page + s.num_pages) for s in held)
        assert all(left[1] <= right[0] for left, right in pairwise(pages))
    for slot in held:
        staging.release(slot)
    assert staging.acquire(2**20) is not None
