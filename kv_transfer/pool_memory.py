"""Copies rows between a contiguous frame body and the blocks of the pool, with the GIL released.

Memory of one (plane, layer) is `[num_blocks, block_size, row_bytes]`, contiguous. Blocks of one frame are copied by one
numpy call whatever their order: a call per block would give the GIL away, and wait for it, hundreds of times a frame.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from isthmus.kv.layout import KvLayout
from isthmus.types import Place
from kv_transfer.coverage import Interval
from kv_transfer.frames import Buffer

Bytes = npt.NDArray[np.uint8]


class RowMemory(Protocol):
    """What sender and receiver need of a cache, wherever it lies. One thread reads rows, one writes them."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def check_table(self, block_table: Sequence[int]) -> None:
        """Raises ValueError for a block id outside the pool."""
        ...

    def row_bytes(self, plane: str) -> int: ...

    def contiguous(self, place: Place, block_table: Sequence[int], interval: Interval) -> memoryview | None:
        """The rows where they lie, if they can be sent from there."""
        ...

    def read_rows(self, place: Place, block_table: Sequence[int], interval: Interval, into: Buffer) -> None:
        """Positions [first, end) of (plane, layer) into the start of `into`; they are there when it returns."""
        ...

    def write_rows(self, place: Place, block_table: Sequence[int], interval: Interval, body: Buffer) -> None:
        """The start of `body` into positions [first, end) of (plane, layer); they are there when it returns."""
        ...


class PoolMemory:
    """Views of a pool in this process's memory; allocates nothing.

    Any thread may copy; who may write which block is the caller's affair.
    """

    def __init__(self, layout: KvLayout, memory: Mapping[Place, memoryview]):
        """Raises ValueError if a plane's layer is missing or does not hold the same number of whole blocks."""
        self.layout = layout
        self._blocks: dict[Place, Bytes] = {}  # [num_blocks, block_size * row_bytes]
        for place in layout.places:
            flat = np.frombuffer(memory[place], dtype=np.uint8)
            self._blocks[place] = flat.reshape(-1, layout.block_size * self.row_bytes(place[0]))
        sizes = {len(blocks) for blocks in self._blocks.values()}
        if len(sizes) != 1:
            raise ValueError(f"layers hold different numbers of blocks: {sorted(sizes)}")
        self.num_blocks = sizes.pop()

    def check_table(self, block_table: Sequence[int]) -> None:
        """Raises ValueError for a block id outside the pool; copies below trust the table."""
        if block_table and not (min(block_table) >= 0 and max(block_table) < self.num_blocks):
            raise ValueError(f"block ids must lie in [0, {self.num_blocks})")

    def row_bytes(self, plane: str) -> int:
        return self.layout.plane(plane).row_bytes

    def contiguous(self, place: Place, block_table: Sequence[int], interval: Interval) -> memoryview | None:
        """The rows where they lie, if their blocks are neighbours in order; None otherwise."""
        first_block = interval[0] // self.layout.block_size
        last_block = (interval[1] - 1) // self.layout.block_size
        run = _as_run(list(block_table[first_block : last_block + 1]))
        if run is None:
            return None
        row_bytes = self.row_bytes(place[0])
        start = (run.start * self.layout.block_size + interval[0] % self.layout.block_size) * row_bytes
        return self._blocks[place].reshape(-1).data[start : start + (interval[1] - interval[0]) * row_bytes]

    def read_rows(self, place: Place, block_table: Sequence[int], interval: Interval, into: Buffer) -> None:
        """Positions [first, end) of (plane, layer) into the start of `into`."""
        blocks = self._blocks[place]
        for ids, columns, piece in self._pieces(place[0], block_table, interval, into):
            if run := _as_run(ids):
                np.copyto(piece, blocks[run, columns])
            else:  # "clip" writes straight into `out`; the table was checked
                np.take(blocks, ids, axis=0, out=piece, mode="clip")

    def write_rows(self, place: Place, block_table: Sequence[int], interval: Interval, body: Buffer) -> None:
        """The start of `body` into positions [first, end) of (plane, layer)."""
        blocks = self._blocks[place]
        for ids, columns, piece in self._pieces(place[0], block_table, interval, body):
            if run := _as_run(ids):
                np.copyto(blocks[run, columns], piece)
            else:
                blocks[ids] = piece

    def _pieces(
        self, plane: str, block_table: Sequence[int], interval: Interval, body: Buffer
    ) -> Iterator[tuple[list[int], slice, Bytes]]:
        """(block ids, their columns, the body's part): a partial first block, whole blocks, a partial last one."""
        row_bytes = self.row_bytes(plane)
        block_size = self.layout.block_size
        rest = np.frombuffer(body, dtype=np.uint8)
        (position, end) = interval
        while position < end:
            index, offset = divmod(position, block_size)
            num_whole = 0 if offset else (end - position) // block_size
            num_rows = block_size if num_whole else min(end - position, block_size - offset)  # of each block
            ids = list(block_table[index : index + max(num_whole, 1)])
            size = len(ids) * num_rows * row_bytes
            yield ids, slice(offset * row_bytes, (offset + num_rows) * row_bytes), rest[:size].reshape(len(ids), -1)
            rest = rest[size:]
            position += len(ids) * num_rows


def _as_run(ids: list[int]) -> slice | None:
    """The ids as one slice when they are consecutive."""
    consecutive = all(after == before + 1 for before, after in pairwise(ids))
    return slice(ids[0], ids[-1] + 1) if consecutive else None
