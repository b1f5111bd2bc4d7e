"""Which streams a decode worker has: by request and by transfer; those that ended and are kept apart from the rest."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from decode_service.stream import ServedStream

MAX_STREAMS = 1024
MAX_KEPT = 1024


@dataclass(eq=False, slots=True)
class StreamTable:
    """Written in the event loop, by `Streams`. Counts and iterates over the streams that have not ended.

    A request may have two streams for a moment: one that makes way, whose end the step loop has not reported yet, and
    the one reserved in its place, which is the one found by the request.
    """

    _by_request: dict[str, ServedStream] = field(default_factory=dict[str, ServedStream], init=False)
    _by_transfer: dict[str, ServedStream] = field(default_factory=dict[str, ServedStream], init=False)
    # In the order of their ends:
    _kept: dict[str, ServedStream] = field(
        default_factory=dict[str, ServedStream], init=False
    )  # in the order of their ends

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[ServedStream]:
        """As they are now; the table may change meanwhile."""
        return iter(list(self._by_request.values()))

    def get(self, request_id: str) -> ServedStream | None:
        """Also one that ended and is kept."""
        return self._by_request.get(request_id) or self._kept.get(request_id)

    def of_transfer(self, transfer_id: str) -> ServedStream | None:
        """One that has not ended."""
        return self._by_transfer.get(transfer_id)

    def add(self, stream: ServedStream) -> None:
        self._by_request[stream.request_id] = stream
        self._by_transfer[stream.transfer_id] = stream

    def remove(self, stream: ServedStream) -> None:
        """It ended, or is gone."""
        self._by_transfer.pop(stream.transfer_id, None)
        if self._by_request.get(stream.request_id) is stream:
            del self._by_request[stream.request_id]

    def keep(self, stream: ServedStream) -> ServedStream | None:
        """Keeps a stream that ended; at the bound, the oldest of those kept, which has to go."""
        self._kept[stream.request_id] = stream
        return next(iter(self._kept.values())) if len(self._kept) > MAX_KEPT else None

    def forget(self, stream: ServedStream) -> bool:
        """Forgets a stream that was kept; whether it was."""
        if self._kept.get(stream.request_id) is not stream:
            return False
        del self._kept[stream.request_id]
        return True

    def kept(self) -> list[ServedStream]:
        return list(self._kept.values())
