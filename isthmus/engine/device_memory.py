"""Blocks in GPU memory for the transfer path, through pinned staging and on streams of its own.

    sending    rows -> gather -> packed -> copy -> pinned -> the frame
    receiving  the frame -> pinned -> copy -> packed -> scatter -> rows

Both return when their stream is through, and wait for it with the GIL released. So a frame is sealed from bytes that
are there, and an acknowledgement, a claim, or the release of a block never comes before its copy has ended: steps
launched after it see the rows without waiting for another stream.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.engine.latent_cache import LatentCache
from isthmus.kv.slots import slots_at
from isthmus.types import Place

_STAGING_BYTES = 4 << 20  # of each direction: the largest frame
_HIGH_PRIORITY = -1  # a few small kernels that need not wait behind a step's

Bytes = bytes | bytearray | memoryview
CopyRows = Callable[[Tensor, Tensor, Tensor], None]  # cache rows [S, bytes], slots [T], packed rows [T, bytes]


def gather_rows(rows_SB: Tensor, slots_T: Tensor, packed_TB: Tensor) -> None:
    """What `kernels.latents.transfer.gather_rows` does, in torch."""
    torch.index_select(rows_SB, 0, slots_T, out=packed_TB)


def scatter_rows(rows_SB: Tensor, slots_T: Tensor, packed_TB: Tensor) -> None:
    """What `kernels.latents.transfer.scatter_rows` does, in torch."""
    rows_SB.index_copy_(0, slots_T, packed_TB)


class DeviceMemory:
    """What `kv_transfer.pool_memory.RowMemory` asks for. One thread reads while one other writes.

    The constructor copies a row both ways: what its kernels lack shows there.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        gather: CopyRows = gather_rows,
        scatter: CopyRows = scatter_rows,
        staging_bytes: int = _STAGING_BYTES,
    ) -> None:
        self.layout = cache.layout
        self.num_blocks = cache.shape.num_blocks
        self._stored = cache.stored
        self._gather = gather
        self._scatter = scatter
        self._rows = {
            (plane, layer): blocks.flatten(0, 1).view(torch.uint8)
            for plane, layers in cache.layers.items()
            for layer, blocks in enumerate(layers)
        }
        device = self._rows[self.layout.places[0]].device
        narrowest = min(plane.row_bytes for plane in self.layout.planes)
        self._outgoing = _Lane(device, staging_bytes, staging_bytes // narrowest)
        self._incoming = _Lane(device, staging_bytes, staging_bytes // narrowest)
        for plane in self.layout.planes:
            row = bytearray(plane.row_bytes)
            self.read_rows((plane.name, 0), [0], (0, 1), row)
            self.write_rows((plane.name, 0), [0], (0, 1), row)

    def check_table(self, block_table: Sequence[int]) -> None:
        """Raises ValueError for a block id outside the pool; copies below trust the table."""
        if block_table and not (min(block_table) >= 0 and max(block_table) < self.num_blocks):
            raise ValueError(f"block ids must lie in [0, {self.num_blocks})")

    def row_bytes(self, plane: str) -> int:
        return self.layout.plane(plane).row_bytes

    def contiguous(self, place: Place, block_table: Sequence[int], interval: tuple[int, int]) -> None:
        """The host sees no row where it lies."""

    def read_rows(self, place: Place, block_table: Sequence[int], interval: tuple[int, int], into: Bytes) -> None:
        """Positions [first, end) of (plane, layer) into the start of `into`, once they are stored."""
        lane = self._outgoing
        for slots, piece in self._pieces(place[0], block_table, interval, into):
            with lane.turn():
                self._stored.wait(*place)
                packed = lane.packed[: piece.size].view(len(slots), -1)
                self._gather(self._rows[place], lane.put(slots), packed)
                lane.pinned[: piece.size].copy_(packed.view(-1), non_blocking=True)
            np.copyto(piece, lane.bytes[: piece.size])

    def write_rows(self, place: Place, block_table: Sequence[int], interval: tuple[int, int], body: Bytes) -> None:
        """The start of `body` into positions [first, end) of (plane, layer)."""
        lane = self._incoming
        for slots, piece in self._pieces(place[0], block_table, interval, body):
            np.copyto(lane.bytes[: piece.size], piece)
            with lane.turn():
                packed = lane.packed[: piece.size]
                packed.copy_(lane.pinned[: piece.size], non_blocking=True)
                self._scatter(self._rows[place], lane.put(slots), packed.view(len(slots), -1))

    def _pieces(
        self, plane: str, block_table: Sequence[int], interval: tuple[int, int], body: Bytes
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
        """(slots, the body's part) of as many rows as the staging holds."""
        row_bytes = self.row_bytes(plane)
        block_size = self.layout.block_size
        first_block = interval[0] // block_size
        last_block = (interval[1] - 1) // block_size
        blocks = np.asarray(block_table[first_block : last_block + 1])
        slots = slots_at(blocks, np.arange(interval[0], interval[1]) - first_block * block_size, block_size)
        rest = np.frombuffer(body, dtype=np.uint8)
        num_rows = len(self._outgoing.bytes) // row_bytes
        for start in range(0, len(slots), num_rows):
            part = slots[start : start + num_rows]
            yield part, rest[start * row_bytes : (start + len(part)) * row_bytes]


class _Lane:
    """One direction: a stream, and what its copies pass through. On a CPU there is nothing to wait for."""

    def __init__(self, device: torch.device, num_bytes: int, num_rows: int) -> None:
        is_cuda = device.type == "cuda"
        self.packed = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.bytes: npt.NDArray[np.uint8] = self.pinned.numpy()
        self._slots = torch.empty(num_rows, dtype=torch.int64, device=device)
        self._pinned_slots = torch.empty(num_rows, dtype=torch.int64, pin_memory=is_cuda)
        self._stream = torch.cuda.Stream(device, priority=_HIGH_PRIORITY) if is_cuda else None
        self._is_through = torch.cuda.Event(blocking=True) if is_cuda else None
        if self._stream is not None:  # what was launched before, the cache's first content say, comes before
            self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is launched inside has ended when it is over, and when it fails halfway."""
        if self._stream is None or self._is_through is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._is_through.record()
                self._is_through.synchronize()

    def put(self, slots: npt.NDArray[np.int64]) -> Tensor:
        """The slots on the device, in the order of this turn; once a turn."""
        self._pinned_slots[: len(slots)] = torch.from_numpy(slots)
        placed = self._slots[: len(slots)]
        placed.copy_(self._pinned_slots[: len(slots)], non_blocking=True)
        return placed
