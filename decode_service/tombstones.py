"""Requests that ended or were cancelled: a late Reserve for one is refused while it could still arrive."""

from collections import OrderedDict
from typing import NamedTuple

from isthmus.clock import Clock

MAX_TOMBSTONES = 10_000


class Tombstone(NamedTuple):
    counter: int  # attach counters up to this one are refused; a later attempt is not
    expires_at: float


class Tombstones:
    """At most MAX_TOMBSTONES requests for `keep_s` seconds each; the oldest go first."""

    def __init__(self, keep_s: float, clock: Clock):
        self._keep_s = keep_s
        self._clock = clock
        self._tombstones: OrderedDict[str, Tombstone] = OrderedDict()

    def add(self, request_id: str, counter: int) -> None:
        self._sweep()
        counter = max(counter, self._tombstones[request_id].counter) if request_id in self._tombstones else counter
        self._tombstones[request_id] = Tombstone(counter, self._clock.now() + self._keep_s)
        self._tombstones.move_to_end(request_id)

    def refuses(self, request_id: str, counter: int) -> bool:
        self._sweep()
        tombstone = self._tombstones.get(request_id)
        return tombstone is not None and counter <= tombstone.counter

    def _sweep(self) -> None:
        now = self._clock.now()
        while self._tombstones:
            request_id, oldest = next(iter(self._tombstones.items()))
            if oldest.expires_at > now and len(self._tombstones) <= MAX_TOMBSTONES:
                return
            del self._tombstones[request_id]
