"""A wire for tests: frames are lost, repeated, held back or damaged where a failpoint says so."""

from collections import deque
from typing import Protocol

from isthmus.failpoints import Failpoints
from kv_transfer.frames import Buffer, FrameHeader

Parts = list[bytes]


class HarmableWire(Protocol):
    """What is wrapped: `dealer_wire.DealerWire`."""

    @property
    def is_closed(self) -> bool: ...

    def send(self, header: bytes, body: bytes) -> None: ...

    def receive(self) -> Parts | None: ...

    def loss(self) -> str: ...

    def close(self) -> None: ...


class Copied:
    """A body that is no longer read where it lay: it was copied."""

    done = True


class HarmedWire:
    """In the place of the wire inside, every message copied. Used by the sender's thread only."""

    def __init__(self, inside: HarmableWire, failpoints: Failpoints):
        self._inside = inside
        self._failpoints = failpoints
        self._held_out: deque[Parts] = deque()  # reordered; each waits for one more message
        self._held_in: deque[Parts] = deque()
        self._received: deque[Parts] = deque()

    @property
    def is_closed(self) -> bool:
        return self._inside.is_closed

    def send(self, header: bytes, body: bytes) -> None:
        """As `wire.Wire` says."""
        for message in self._harmed([header, body], self._held_out):
            self._inside.send(*message)

    def send_rows(self, header: bytes, body: Buffer) -> Copied:
        """As `wire.Wire` says."""
        self.send(header, bytes(body))
        return Copied()

    def receive(self) -> Parts | None:
        """A message that has come; None: no more, or closed."""
        while not self._received:
            parts = self._inside.receive()
            if parts is None:
                return None
            self._received.extend(self._harmed(parts, self._held_in))
        return None if self.is_closed else self._received.popleft()

    def loss(self) -> str:
        return self._inside.loss()

    def close(self) -> None:
        """As `wire.Wire` says."""
        self._inside.close()

    def _harmed(self, parts: Parts, held: deque[Parts]) -> list[Parts]:
        """What goes on in the place of a message, by the failpoint of its kind."""
        before = list(held)
        match self._failpoints.hit(f"transfer.{FrameHeader.decode(parts[0]).kind.name.lower()}"):
            case "drop":
                return []
            case "reorder":
                held.append(parts)
                return []
            case "duplicate":
                now = [parts, parts]
            case "corrupt":
                body = bytearray(parts[1])
                body[len(body) // 2] ^= 1
                now = [[parts[0], bytes(body)]]
            case _:
                now = [parts]
        held.clear()
        return now + before
