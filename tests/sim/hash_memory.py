"""The cache of a fake engine, as transfers read and write it: a row is the 8 bytes of its number, on every layer."""

from collections.abc import Sequence
from typing import Protocol

from isthmus.kv.layout import KvLayout
from isthmus.types import Place
from kv_transfer.frames import Buffer


class EngineRows(Protocol):
    """A fake engine."""

    rows: dict[int, int]

    @property
    def layout(self) -> KvLayout: ...


class HashMemory:
    """`kv_transfer.pool_memory.RowMemory` over the engine's rows. Layers above the first hold copies of their own."""

    def __init__(self, engine: EngineRows, num_blocks: int):
        self.layout = engine.layout
        self.num_blocks = num_blocks
        self._engine = engine
        self._above: dict[tuple[Place, int], int] = {}  # what came for the layers above the first, by slot

    def check_table(self, block_table: Sequence[int]) -> None:
        assert all(0 <= block < self.num_blocks for block in block_table)

    def row_bytes(self, plane: str) -> int:
        return self.layout.plane(plane).row_bytes

    def contiguous(self, place: Place, block_table: Sequence[int], interval: tuple[int, int]) -> None:
        """Rows are never sent from where they lie."""

    def read_rows(self, place: Place, block_table: Sequence[int], interval: tuple[int, int], into: Buffer) -> None:
        packed = b"".join(self._engine.rows[slot].to_bytes(8) for slot in self._slots(block_table, interval))
        memoryview(into)[: len(packed)] = packed

    def write_rows(self, place: Place, block_table: Sequence[int], interval: tuple[int, int], body: Buffer) -> None:
        for index, slot in enumerate(self._slots(block_table, interval)):
            row = int.from_bytes(bytes(body[8 * index : 8 * index + 8]))
            if place[1] == 0:
                self._engine.rows[slot] = row
            else:
                self._above[place, slot] = row

    def check_layers(self, block_table: Sequence[int], interval: tuple[int, int]) -> None:
        """Every layer of what came has the same rows: none is stale, foreign or half written."""
        for slot in self._slots(block_table, interval):
            rows = {self._above.get((place, slot), self._engine.rows[slot]) for place in self.layout.places}
            assert len(rows) == 1, f"layers of slot {slot} differ"

    def _slots(self, block_table: Sequence[int], interval: tuple[int, int]) -> list[int]:
        size = self.layout.block_size
        return [block_table[position // size] * size + position % size for position in range(*interval)]
