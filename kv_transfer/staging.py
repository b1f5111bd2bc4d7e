"""Preallocated memory from which frames are sent; a piece is used again only when nobody reads it any more."""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class StagingSlot:
    first_page: int
    num_pages: int
    view: memoryview  # exactly the bytes asked for


class Staging:
    """First fit over free runs of pages. Used by the sender's thread only."""

    def __init__(self, capacity_bytes: int):
        self._memory = np.zeros(_num_pages(capacity_bytes) * _PAGE_BYTES, dtype=np.uint8).data
        self._free: list[tuple[int, int]] = [(0, _num_pages(capacity_bytes))]  # (first page, end), sorted, not touching

    def acquire(self, num_bytes: int) -> StagingSlot | None:
        """None when no run of free pages is long enough."""
        need = _num_pages(num_bytes)
        for at, (first, end) in enumerate(self._free):
            if end - first >= need:
                rest = (first + need, end)
                self._free[at : at + 1] = [rest] if rest[0] < rest[1] else []
                start = first * _PAGE_BYTES
                return StagingSlot(first, need, self._memory[start : start + num_bytes])
        return None

    def release(self, slot: StagingSlot) -> None:
        first = slot.first_page
        end = slot.first_page + slot.num_pages
        at = bisect_left(self._free, (first, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at > 0 and self._free[at - 1][1] == first:
            at -= 1
            first = self._free.pop(at)[0]
        self._free.insert(at, (first, end))


def _num_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE_BYTES)
