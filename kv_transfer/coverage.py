"""Which positions of which plane and layer are still to come: intervals, never a count of frames."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace

from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, Place

Interval = tuple[int, int]  # [first, end)


class Coverage:
    """Starts with everything in `extents`, of planes of `layout`, missing.

    Written by its one owner only: the transfer whose rows it follows, on the thread or under the lock that owns that.
    """

    def __init__(self, layout: KvLayout, extents: Iterable[Extent]):
        self._layout = layout
        self._granted: dict[Place, list[Interval]] = {}
        for extent in sorted(extents, key=lambda extent: (layout.number_of(extent.plane), extent.layer)):
            _add(self._granted.setdefault(extent.place, []), extent.first_token, extent.end)
        self._left = {place: list(intervals) for place, intervals in self._granted.items()}
        self._num_required_left = sum(extent.num_tokens for extent in self.missing_required())

    @property
    def is_complete(self) -> bool:
        """Every row of a required plane has come."""
        return self._num_required_left == 0

    def grants(self, place: Place, interval: Interval) -> bool:
        """Whether the whole interval was asked for, come or not."""
        intervals = self._granted.get(place, [])
        at = bisect_right(intervals, (interval[0], 2**63)) - 1
        return at >= 0 and interval[0] < interval[1] <= intervals[at][1]

    def gaps(self, place: Place, interval: Interval) -> list[Interval]:
        """The parts of the interval that are still missing, in order."""
        first, end = interval
        left = self._left.get(place, [])
        at = max(bisect_right(left, (first, 2**63)) - 1, 0)
        found: list[Interval] = []
        while at < len(left) and left[at][0] < end:
            part = (max(first, left[at][0]), min(end, left[at][1]))
            if part[0] < part[1]:
                found.append(part)
            at += 1
        return found

    def cover(self, place: Place, interval: Interval) -> None:
        """The interval has come; covering twice changes nothing."""
        left = self._left.get(place, [])
        for first, end in self.gaps(place, interval):
            at = bisect_right(left, (first, 2**63)) - 1
            start, stop = left[at]
            left[at : at + 1] = [part for part in ((start, first), (end, stop)) if part[0] < part[1]]
            if not self._layout.plane(place[0]).advisory:
                self._num_required_left -= end - first

    def missing(self) -> tuple[Extent, ...]:
        """By place and position, in the layout's order of places."""
        return tuple(
            Extent(*place, first, end - first) for place, intervals in self._left.items() for first, end in intervals
        )

    def missing_required(self) -> tuple[Extent, ...]:
        """Those of `missing` that must come before anything can rest on the rows."""
        return self._layout.required(self.missing())


def extents(layout: KvLayout, first: int, end: int) -> tuple[Extent, ...]:
    """Positions [first, end) of every plane and layer, advisory ones included."""
    return tuple(Extent(*place, first, end - first) for place in layout.places if end > first)


def normalised(layout: KvLayout, extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The same positions as sorted, disjoint, merged extents: equal sets compare equal."""
    return Coverage(layout, extents).missing()


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
