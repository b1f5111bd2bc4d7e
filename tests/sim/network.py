"""The network between simulated processes: streams in order, with delays that the seed decides, broken by a death."""

from collections.abc import Callable
from typing import Protocol

from isthmus.testing.virtual_time import VirtualTime

MIN_DELAY_S, MAX_DELAY_S = 0.0002, 0.004
LOSS_NOTICE_S = 0.02  # from a process's death until its peers' connections are reset, at most


class Mortal(Protocol):
    """A simulated process, as the network sees it."""

    @property
    def is_alive(self) -> bool: ...


class Stream:
    """One direction of a connection to a process. What is sent arrives in order, unless the receiver dies before."""

    def __init__(self, time: VirtualTime, receiver: Mortal):
        self._time = time
        self._receiver = receiver
        self._arrives_at = 0.0
        self.is_open = True

    def send(self, deliver: Callable[[], object]) -> None:
        at = max(self._arrives_at, self._time.now() + self._time.random.uniform(MIN_DELAY_S, MAX_DELAY_S))
        self._arrives_at = at
        self._time.after(at - self._time.now(), lambda: self._deliver(deliver))

    def _deliver(self, deliver: Callable[[], object]) -> None:
        if self.is_open and self._receiver.is_alive:
            deliver()


class Connection:
    """Both directions between two processes. When one dies, the other hears `lost`, once, a little later."""

    def __init__(self, time: VirtualTime, here: Mortal, there: Mortal):
        self._time = time
        self.to = Stream(time, there)
        self.back = Stream(time, here)
        self._lost: list[Callable[[], None]] = []
        self.is_open = True

    def on_lost(self, lost: Callable[[], None]) -> None:
        self._lost.append(lost)

    def end(self) -> None:
        """Whoever hears of it hears it after what is under way."""
        if self.is_open:
            self.is_open = False
            for lost in self._lost:
                self._time.after(self._time.random.uniform(MAX_DELAY_S, LOSS_NOTICE_S), lost)
