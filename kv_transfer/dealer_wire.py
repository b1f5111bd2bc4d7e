"""A sender's connections over ZeroMQ: a DEALER socket each, watched by a monitor that tells when it is lost."""

import math

import zmq
from zmq.utils.monitor import parse_monitor_message

from isthmus.failpoints import Failpoints
from kv_transfer.faulty_wire import HarmedWire
from kv_transfer.frames import Buffer
from kv_transfer.sockets import Context, open_dealer
from kv_transfer.waker import Waker
from kv_transfer.wire import LinkLost, Reading, Wire

_SEND_MORE = zmq.SNDMORE | zmq.NOBLOCK
_LOST_EVENTS = (
    zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class DealerWire:
    """Used by the sender's thread only. The socket is never full: credit bounds what waits in it."""

    def __init__(self, context: Context, endpoint: str, poller: zmq.Poller):
        """Raises LinkLost for an endpoint that is none."""
        self.socket = open_dealer(context)
        self.monitor = self.socket.get_monitor_socket(_LOST_EVENTS)
        self._poller = poller
        self.is_closed = False
        poller.register(self.socket, zmq.POLLIN)
        poller.register(self.monitor, zmq.POLLIN)
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise LinkLost(f"cannot connect: {error}") from error

    def send(self, header: bytes, body: bytes) -> None:
        """As `wire.Wire` says."""
        try:
            self.socket.send_multipart([header, body], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise LinkLost(f"cannot send: {error}") from error

    def send_rows(self, header: bytes, body: Buffer) -> Reading:
        """As `wire.Wire` says."""
        try:
            self.socket.send(header, _SEND_MORE)
            tracker = self.socket.send(body, zmq.NOBLOCK, copy=False, track=True)
        except zmq.ZMQError as error:
            raise LinkLost(f"cannot send: {error}") from error
        assert isinstance(tracker, zmq.MessageTracker), "track=True returns a tracker"
        return tracker

    def receive(self) -> list[bytes] | None:
        """A message that has come; None: no more, or closed."""
        if self.is_closed:
            return None
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def loss(self) -> str:
        """Why the connection is gone: closed, refused or unable to shake hands. Empty: it is not known to be."""
        if self.is_closed:
            return ""
        try:
            event = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return ""
        return f"connection lost ({zmq.Event(event['event']).name or 'closed'})".lower()

    def close(self) -> None:
        """As `wire.Wire` says."""
        self.is_closed = True
        self._poller.unregister(self.socket)
        self._poller.unregister(self.monitor)
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()


SpeakingWire = DealerWire | HarmedWire


class DealerWires:
    """Opens wires and waits for what they have to say. Used by the sender's thread, woken by any."""

    def __init__(self, failpoints: Failpoints):
        self._failpoints = failpoints
        self._context: Context = zmq.Context(io_threads=1)
        self._waker = Waker()
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fd, zmq.POLLIN)
        self._speakers: dict[object, SpeakingWire] = {}  # by socket and by monitor

    def open(self, endpoint: str) -> Wire:
        """As `wire.OpenWire` says."""
        dealer = DealerWire(self._context, endpoint, self._poller)
        wire = HarmedWire(dealer, self._failpoints) if self._failpoints.harm_the_wire else dealer
        self._speakers = {who: known for who, known in self._speakers.items() if not known.is_closed}
        self._speakers[dealer.socket] = wire
        self._speakers[dealer.monitor] = wire
        return wire

    def wait(self, seconds: float | None) -> list[SpeakingWire]:
        """Those that have something to say; none after a wake-up, or after so long. None: without end."""
        timeout_ms = None if seconds is None else max(0, math.ceil(seconds * 1000))
        speaking = [who for who, _ in self._poller.poll(timeout_ms)]
        if self._waker.fd in speaking:
            self._waker.clear()
        return list(dict.fromkeys(self._speakers[who] for who in speaking if who in self._speakers))

    def wake(self) -> None:
        """Any thread."""
        self._waker.wake()

    def close(self) -> None:
        """After every wire: returns when ZeroMQ holds no message any more, and reads no body."""
        self._context.term()

    def forget_waker(self) -> None:
        """After the waiting thread has ended."""
        self._waker.close()
