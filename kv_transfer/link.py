"""One DEALER to one receiver incarnation: credit, frames under way, answers, and news of a lost connection."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from isthmus.failpoints import Failpoints
from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, TransferTarget
from kv_transfer.faulty_wire import HarmedWire
from kv_transfer.frames import MAX_BODY_BYTES, Buffer, FrameHeader, FrameKind, FrameName, is_intact, seal
from kv_transfer.messages import decode_credit, encode_credit
from kv_transfer.outgoing import OutgoingTransfer
from kv_transfer.sockets import Context, open_dealer
from kv_transfer.staging import StagingSlot

_SEND_MORE = zmq.SNDMORE | zmq.NOBLOCK
_LOST_EVENTS = (
    zmq.Event.DISCONNECTED
    | zmq.Event.CLOSED
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class LinkLost(Exception):
    """The receiver cannot be reached over this link any more; says why."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A fill frame without an answer; its memory may change after the answer, or after the tracker of a closed link."""

    transfer: OutgoingTransfer
    plane: str
    num_bytes: int
    slot: StagingSlot | None  # None: sent straight from the pool
    tracker: zmq.MessageTracker


class Link:
    """Used by the sender's thread only. Asks for credit as soon as it exists."""

    def __init__(
        self, context: Context, sender: bytes, layout: KvLayout, target: TransferTarget, failpoints: Failpoints
    ):
        """Raises LinkLost for an endpoint that is none, ValueError for ids that are not hex."""
        ends = (bytes.fromhex(target.layout_fingerprint), sender, bytes.fromhex(target.receiver_incarnation))
        self._blank = FrameHeader(FrameKind.CREDIT, *ends)  # what every header on this link has in common
        self._layout = layout
        self.credit_bytes = 0
        self.max_body_bytes = MAX_BODY_BYTES
        self.in_flight: dict[FrameName, InFlight] = {}
        self.transfers: set[OutgoingTransfer] = set()
        self.ready: deque[OutgoingTransfer] = deque()  # those with work, each once, in turn
        self.waiting_since: float | None = None  # Clock.now(): an answer or credit is due since then
        self.used_at = 0.0  # Clock.now() of the last transfer's end
        self.socket = open_dealer(context)
        self._wire = HarmedWire(self.socket, failpoints) if failpoints.harm_the_wire else self.socket
        self.monitor = self.socket.get_monitor_socket(_LOST_EVENTS)
        try:
            if not target.zmq_endpoint.startswith("tcp://"):
                raise LinkLost(f"not a tcp endpoint: {target.zmq_endpoint[:80]}")
            self.socket.connect(target.zmq_endpoint)
        except (zmq.ZMQError, LinkLost) as error:
            self.close()
            raise LinkLost(f"cannot connect: {error}") from error
        self._has_window = False
        self.send_small(FrameKind.CREDIT, encode_credit(0))

    def send_small(self, kind: FrameKind, body: bytes, target: TransferTarget | None = None) -> None:
        """Commit, abort or a request for credit: these need none. Raises LinkLost."""
        header = self._header(kind, body, target)
        try:
            self._wire.send_multipart([seal(header, body), body], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise LinkLost(f"cannot send: {error}") from error

    def send_fill(self, target: TransferTarget, rows: Extent, body: memoryview) -> tuple[FrameName, zmq.MessageTracker]:
        """The body is read until the tracker is done. Raises LinkLost: the socket itself is never full."""
        place = {"plane": self._layout.number_of(rows.plane), "layer": rows.layer, "first_token": rows.first_token}
        header = self._header(FrameKind.FILL, body, target, num_tokens=rows.num_tokens, **place)
        try:
            self._wire.send(seal(header, body), _SEND_MORE)
            tracker = self._wire.send(body, zmq.NOBLOCK, copy=False, track=True)
        except zmq.ZMQError as error:
            raise LinkLost(f"cannot send: {error}") from error
        assert isinstance(tracker, zmq.MessageTracker), "track=True returns a tracker"
        self.credit_bytes -= len(body)
        return header.name, tracker

    def answers(self) -> Iterator[tuple[FrameHeader, bytes]]:
        """What has come, verified. Credit is taken here. Raises LinkLost or BadFrame for what ours would not send."""
        while True:
            try:
                parts = self._wire.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            header, body = self._verified(parts)
            if header.kind is FrameKind.CREDIT:
                self.take_credit(decode_credit(body))
            yield header, body

    def await_since(self, now: float) -> None:
        """An answer or credit is due from now on, if it was not before."""
        if self.waiting_since is None:
            self.waiting_since = now

    def progressed(self, now: float) -> None:
        """An answer came; the wait starts again if more is due."""
        self.waiting_since = now if self.in_flight else None

    def check_connection(self) -> bool:
        """False, or raises LinkLost when ZeroMQ reports the connection closed, refused or unable to shake hands."""
        try:
            event = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return False
        raise LinkLost(f"connection lost ({zmq.Event(event['event']).name or 'closed'})".lower())

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def _header(self, kind: FrameKind, body: Buffer, target: TransferTarget | None, **place: int) -> FrameHeader:
        fields: dict[str, Any] = {**place, "body_bytes": len(body)}
        if target is not None:
            fields |= {"transfer": bytes.fromhex(target.transfer_id), "attempt": target.attempt}
        return replace(self._blank, kind=kind, **fields)

    def _verified(self, parts: list[bytes]) -> tuple[FrameHeader, bytes]:
        header = FrameHeader.decode(parts[0])
        if len(parts) != 2 or not is_intact(parts[0], parts[1]):
            raise LinkLost("bad answer: damaged")
        ours = self._blank
        is_ours = (header.sender, header.receiver, header.fingerprint) == (ours.receiver, ours.sender, ours.fingerprint)
        if not is_ours and header.kind is not FrameKind.ABORT:  # a refusal may come from whoever lives there now
            raise LinkLost("bad answer: of somebody else")
        return header, parts[1]

    def take_credit(self, num_bytes: int) -> None:
        if not self._has_window:
            self._has_window = True
            # At most half the window: the rest is granted again while a frame is under way.
            self.max_body_bytes = min(MAX_BODY_BYTES, max(num_bytes // 2, 1))
        self.credit_bytes += num_bytes
