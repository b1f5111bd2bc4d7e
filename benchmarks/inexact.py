"""Our own best variants without exactness, to say what it costs: only tiles of rows and splits of attention change.

A row's bits may then depend on how many rows a step has: tiles of rows are no larger than the step needs, and splits of
attention as long as they keep every multiprocessor busy.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kernels import table
from kernels.attention_decode.schedule import Plan, Splits, plan_of

ROW_TILES = (16, 32, 64, 128)
SPLITS = (512, 2048, 8192, 32768)  # few, since each is compiled
Entry = Mapping[str, Any]


@contextmanager
def changed(change: Callable[[str, str, dict[str, int]], Mapping[str, int]]) -> Iterator[None]:
    """Inside, every entry has the constants that `change(kernel, variant, constants)` gives."""
    original = table.table
    known = table.table()

    def altered(kernel: str, variants: Mapping[str, Entry]) -> dict[str, Entry]:
        return {
            variant: {**entry, "constants": change(kernel, variant, dict(entry["constants"]))}
            for variant, entry in variants.items()
        }

    entries = {
        kernel: {architecture: altered(kernel, variants) for architecture, variants in architectures.items()}
        for kernel, architectures in known.items()
    }
    table.table = lambda: entries
    try:
        yield
    finally:
        table.table = original


@contextmanager
def with_row_tile(tile: int) -> Iterator[None]:
    """Products take tiles of so many rows."""
    with changed(lambda _kernel, _variant, constants: row_tile(constants, tile)):
        yield


@contextmanager
def without_exactness(num_rows: int) -> Iterator[None]:
    """What we would choose for a decode step of so many rows if its other rows did not matter."""
    with changed(lambda _kernel, variant, constants: for_batch(variant, constants, num_rows)):
        yield


def for_batch(variant: str, constants: dict[str, int], num_rows: int) -> dict[str, int]:
    """The smallest tile of rows that holds the step; experts have a few rows each up to a batch of 128."""
    if "role=prefill" in variant:
        return constants
    tile = next((tile for tile in ROW_TILES if tile >= num_rows), ROW_TILES[-1])
    if "BLOCK_ROWS" in constants:
        return row_tile(constants, min(tile, constants["BLOCK_ROWS"]))
    if "TILE" in constants:
        return {**constants, "TILE": min(16 if num_rows <= 64 else 32, constants["TILE"])}
    return constants


def plan_for(num_heads: int, num_rows: int, context: int, programs: int) -> Plan:
    """Splits of one length, as long as leaves no program without one."""
    usual = plan_of(num_heads)
    share = context * num_rows * usual.tiles(num_heads) // programs
    size = max((size for size in SPLITS if size <= share), default=SPLITS[0])
    return usual._replace(splits=Splits(size, size, size, size, 2 * size))


def row_tile(constants: dict[str, int], tile: int) -> dict[str, int]:
    return {**constants, "BLOCK_ROWS": tile} if "BLOCK_ROWS" in constants else constants
