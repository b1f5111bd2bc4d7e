"""Continuous batching, pure: a new stream joins at the next step, an ended one leaves at once."""

from collections import deque
from collections.abc import Callable, Mapping

from decode_service.stream import Row, Stream, UnderWay

REPLAY_ROWS = 64  # a step computes at most so many rows beyond one for each stream: running streams keep their pace

Turn = tuple[Stream, list[Row]]  # a stream, and what a step computes of it
NOTHING: Mapping[Stream, UnderWay] = {}


class Scheduler:
    """Streams in arrival order; at most `max_batch` run, the rest wait for a place. `on_run` hears who got one."""

    def __init__(self, max_batch: int, on_run: Callable[[Stream], None]):
        self._max_batch = max_batch
        self._on_run = on_run
        self._running: dict[str, Stream] = {}
        self._waiting: deque[Stream] = deque()

    def join(self, stream: Stream) -> None:
        self._waiting.append(stream)

    def leave(self, stream: Stream) -> bool:
        """Whether the stream was here."""
        if self._running.pop(stream.request_id, None) is not None:
            return True
        if stream in self._waiting:
            self._waiting.remove(stream)
            return True
        return False

    def batch(self, under_way: Mapping[Stream, UnderWay] = NOTHING) -> list[Turn]:
        """The step after the one that is under way, if one is, once the waiting streams took the free places.

        The first to replay replays the most.
        """
        while self._waiting and len(self._running) < self._max_batch:
            stream = self._waiting.popleft()
            self._running[stream.request_id] = stream
            self._on_run(stream)
        turns: list[Turn] = []
        num_left = REPLAY_ROWS
        for stream in self._running.values():
            rows = stream.rows(num_left, under_way.get(stream))
            num_left -= len(rows) - 1
            turns.append((stream, rows))
        return turns

    def expired(self, now: float) -> list[Stream]:
        return [stream for stream in self.streams() if stream.deadline is not None and stream.deadline <= now]

    def streams(self) -> list[Stream]:
        return [*self._running.values(), *self._waiting]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)
