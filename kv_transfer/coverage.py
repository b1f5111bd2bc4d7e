"""Which positions of which plane and layer are still to come: intervals, never a count of frames."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace

from isthmus.kv.layout import KvLayout
from isthmus.types import Extent

Place = tuple[int, int]  # (plane, layer)
Interval = tuple[int, int]  # [first, end)


class Coverage:
    """Starts with everything in `extents` missing. One owner; not thread-safe."""

    def __init__(self, extents: Iterable[Extent]):
        self._granted: dict[Place, list[Interval]] = {}
        for extent in extents:
            _add(self._granted.setdefault((extent.plane, extent.layer), []), extent.first_token, extent.end)
        self._left = {place: list(intervals) for place, intervals in self._granted.items()}
        self._num_left = sum(end - first for intervals in self._left.values() for first, end in intervals)

    @property
    def is_complete(self) -> bool:
        return self._num_left == 0

    def grants(self, plane: int, layer: int, interval: Interval) -> bool:
        """Whether the whole interval was asked for, come or not."""
        intervals = self._granted.get((plane, layer), [])
        at = bisect_right(intervals, (interval[0], 2**63)) - 1
        return at >= 0 and interval[0] < interval[1] <= intervals[at][1]

    def gaps(self, plane: int, layer: int, interval: Interval) -> list[Interval]:
        """The parts of the interval that are still missing, in order."""
        first, end = interval
        left = self._left.get((plane, layer), [])
        at = max(bisect_right(left, (first, 2**63)) - 1, 0)
        found: list[Interval] = []
        while at < len(left) and left[at][0] < end:
            part = (max(first, left[at][0]), min(end, left[at][1]))
            if part[0] < part[1]:
                found.append(part)
            at += 1
        return found

    def cover(self, plane: int, layer: int, interval: Interval) -> None:
        """The interval has come; covering twice changes nothing."""
        left = self._left.get((plane, layer), [])
        for first, end in self.gaps(plane, layer, interval):
            at = bisect_right(left, (first, 2**63)) - 1
            start, stop = left[at]
            left[at : at + 1] = [part for part in ((start, first), (end, stop)) if part[0] < part[1]]
            self._num_left -= end - first

    def missing(self) -> tuple[Extent, ...]:
        return tuple(
            Extent(plane, layer, first, end - first)
            for (plane, layer), intervals in sorted(self._left.items())
            for first, end in intervals
        )


def extents(layout: KvLayout, first: int, end: int) -> tuple[Extent, ...]:
    """Positions [first, end) of every plane and layer."""
    return tuple(Extent(*place, first, end - first) for place in layout.places if end > first)


def normalised(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same positions as sorted, disjoint, merged extents: equal sets compare equal."""
    return Coverage(extents).missing()


def clipped(extents: Iterable[Extent], end: int) -> tuple[Extent, ...]:
    """Their positions below `end`."""
    below = (extent for extent in extents if extent.first_token < end)
    return tuple(replace(extent, num_tokens=min(extent.end, end) - extent.first_token) for extent in below)


def _add(intervals: list[Interval], first: int, end: int) -> None:
    """Inserts [first, end), merging what touches it."""
    touching = [interval for interval in intervals if interval[0] <= end and first <= interval[1]]
    for interval in touching:
        intervals.remove(interval)
    merged = (min([first, *(i[0] for i in touching)]), max([end, *(i[1] for i in touching)]))
    if merged[0] < merged[1]:
        intervals.insert(bisect_right(intervals, merged), merged)
