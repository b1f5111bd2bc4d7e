"""A link's socket for tests of the wire: frames are lost, repeated, held back or damaged where a failpoint says so."""

from collections import deque

import zmq

from isthmus.failpoints import Failpoints
from kv_transfer.frames import FrameHeader
from kv_transfer.sockets import Socket

Parts = list[bytes]


class HarmedWire:
    """In the place of a DEALER socket: what `link.Link` calls, every message copied. Used by one thread."""

    def __init__(self, socket: Socket, failpoints: Failpoints):
        self._socket = socket
        self._failpoints = failpoints
        self._header = b""  # sent ahead of its body
        self._held_out: deque[Parts] = deque()  # reordered; each waits for one more message
        self._held_in: deque[Parts] = deque()
        self._received: deque[Parts] = deque()

    def send(
        self, part: bytes | memoryview, flags: int, *, copy: bool = True, track: bool = False
    ) -> zmq.MessageTracker:
        if flags & zmq.SNDMORE:
            self._header = bytes(part)
        else:
            self.send_multipart([self._header, bytes(part)], flags)
        return zmq.MessageTracker()  # done: nothing of the caller's is read any more

    def send_multipart(self, parts: Parts, flags: int) -> None:
        for message in self._harmed(parts, self._held_out):
            self._socket.send_multipart(message, flags)

    def recv_multipart(self, flags: int) -> Parts:
        """Raises zmq.Again when nothing has come."""
        while not self._received:
            self._received.extend(self._harmed(self._socket.recv_multipart(flags), self._held_in))
        return self._received.popleft()

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
