"""Continuous batching, pure: a new stream joins at the next step, an ended one leaves at once."""

from collections import deque

from decode_service.stream import Stream


class Scheduler:
    """Streams in arrival order; at most `max_batch` run, the rest wait for a place."""

    def __init__(self, max_batch: int):
        self._max_batch = max_batch
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

    def batch(self) -> list[Stream]:
        """The streams of the next step, after the waiting ones took the free places."""
        while self._waiting and len(self._running) < self._max_batch:
            stream = self._waiting.popleft()
            self._running[stream.request_id] = stream
        return list(self._running.values())

    def expired(self, now: float) -> list[Stream]:
        return [stream for stream in self.streams() if stream.deadline is not None and stream.deadline <= now]

    def streams(self) -> list[Stream]:
        return [*self._running.values(), *self._waiting]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)
