"""Where in a plane's memory a position's row lies: slots, numbered through all blocks of the pool. No torch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """How many blocks a cache has, and how many positions a block holds."""

    num_blocks: int
    block_size: int

    @property
    def zero_slot(self) -> int:
        """The slot past the last block: it holds zeros and stands for every key that is not to be seen."""
        return self.num_blocks * self.block_size


def slots_at(block_tables: Integers, positions: Integers, block_size: int) -> npt.NDArray[np.int64]:
    """Slots of positions: the position's block in the table, times the block size, plus its place in that block.

    `block_tables` is [..., blocks] and `positions` [..., any number], with the same leading axes: each row of positions
    has a table. The slots have the shape of `positions`.
    """
    blocks = np.take_along_axis(block_tables, positions // block_size, axis=-1)
    return blocks.astype(np.int64) * block_size + positions % block_size
