"""Requests that ended or were cancelled: a late Reserve for one is refused while it could still arrive."""

from collections import OrderedDict
from typing import NamedTuple

MAX_TOMBSTONES = 10_000


class Tombstone(NamedTuple):
    counter: int  # attach counters up to this one are refused; a later attempt is not
    expires_at: float


class Tombstones:
    """At most MAX_TOMBSTONES requests for `keep_s` seconds each; the oldest go first. Written in the event loop."""

    def __init__(self, keep_s: float):
        self._keep_s = keep_s
        self._tombstones: OrderedDict[str, Tombstone] = OrderedDict()

    def add(self, request_id: str, counter: int, now: float) -> None:
        self._sweep(now)
        earlier = self._tombstones.get(request_id)
        if earlier is not None:
            counter = max(counter, earlier.counter)
        self._tombstones[request_id] = Tombstone(counter, now + self._keep_s)
        self._tombstones.move_to_end(request_id)

    def refuses(self, request_id: str, counter: int, now: float) -> bool:
        self._sweep(now)
        tombstone = self._tombstones.get(request_id)
        return tombstone is not None and counter <= tombstone.counter

    def _sweep(self, now: float) -> None:
        while self._tombstones:
            request_id, oldest = next(iter(self._tombstones.items()))
            if oldest.expires_at > now and len(self._tombstones) <= MAX_TOMBSTONES:
                return
            del self._tombstones[request_id]
