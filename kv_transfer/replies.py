"""What a receiver answers: acks with credit, and refusals, each on the link its frame came from."""

from dataclasses import dataclass, field

import zmq

from kv_transfer.counters import Counters
from kv_transfer.frames import NO_TRANSFER, BadFrame, FrameHeader, FrameKind, FrameName, Refusal, seal
from kv_transfer.messages import Abort, encode_credit
from kv_transfer.peers import Peer
from kv_transfer.sockets import Socket


@dataclass(eq=False, slots=True)
class Replies:
    """Never blocks: an answer to a link that is gone or does not read is dropped and counted. One thread.

    At most `max_peers` links, each with `window_bytes` of credit: what an honest sender can make a receiver hold.
    Acks are gathered and sent by `flush`, at the end of a burst of messages or when a quarter of the window is owed.
    """

    socket: Socket
    incarnation: bytes  # this receiver's
    fingerprint: bytes  # of its layout
    counters: Counters
    window_bytes: int
    max_peers: int
    _peers: dict[bytes, Peer] = field(default_factory=dict[bytes, Peer], init=False)  # by routing id
    _waiting: set[bytes] = field(default_factory=set[bytes], init=False)  # links with something to be told

    def admit(self, link: bytes, header: FrameHeader) -> None:
        """Grants the window to a link that asks, nothing when it asks again. Raises BadFrame when there is no room."""
        if link in self._peers:
            self._grant(link, header.sender, 0)
            return
        if len(self._peers) >= self.max_peers:
            self._forget_unreachable()
            if len(self._peers) >= self.max_peers:
                raise BadFrame(Refusal.TOO_MANY_PEERS)
        self._peers[link] = Peer(header.sender, self.window_bytes)
        self._grant(link, header.sender, self.window_bytes)

    def spend(self, link: bytes, sender: bytes, num_bytes: int) -> None:
        """Raises BadFrame for a link that has no credit for what it sent, or speaks for another incarnation."""
        peer = self._peers.get(link)
        if peer is None or not peer.spend(num_bytes):
            raise BadFrame(Refusal.NO_CREDIT)
        self._waiting.add(link)
        if peer.incarnation != sender:
            raise BadFrame(Refusal.WRONG_SENDER)

    def ack(self, link: bytes, name: FrameName) -> None:
        """The frame is accepted; its sender is told by the next flush."""
        if (peer := self._peers.get(link)) is not None:
            peer.accepted.append(name)
            self._waiting.add(link)
            if peer.is_answer_due:
                self._flush_link(link)

    def refuse(self, link: bytes, header: FrameHeader, refusal: Refusal) -> None:
        self.counters.add(f"refused.{refusal.value}")
        self._abort(link, header.sender, header.name, Abort(refusal.value, refused=header.kind))

    def abort(self, link: bytes, transfer: bytes, attempt: int, cause: str) -> None:
        """Tells the sender that the transfer ended here."""
        peer = self._peers.get(link)
        if peer is not None:
            name = FrameName(FrameKind.ABORT.value, transfer, attempt)
            self._abort(link, peer.incarnation, name, Abort(cause))

    def flush(self) -> None:
        while self._waiting:
            self._flush_link(self._waiting.pop())

    def _flush_link(self, link: bytes) -> None:
        if (peer := self._peers.get(link)) is not None and (answer := peer.take_answer()) is not None:
            self._send(link, FrameKind.ACK, peer.incarnation, FrameName(0, NO_TRANSFER, 0), answer.encode())

    def _abort(self, link: bytes, receiver: bytes, name: FrameName, abort: Abort) -> None:
        """Echoes the frame's name to whoever sent it, after the acks that came before."""
        self._flush_link(link)
        self._send(link, FrameKind.ABORT, receiver, name, abort.encode())

    def _grant(self, link: bytes, incarnation: bytes, num_bytes: int) -> None:
        self._send(link, FrameKind.CREDIT, incarnation, FrameName(0, NO_TRANSFER, 0), encode_credit(num_bytes))

    def _send(self, link: bytes, kind: FrameKind, receiver: bytes, name: FrameName, body: bytes) -> None:
        _, transfer, attempt, *place = name
        ends = (self.fingerprint, self.incarnation, receiver)
        header = FrameHeader(kind, *ends, transfer, attempt, *place, body_bytes=len(body))
        try:
            self.socket.send_multipart([link, seal(header, body), body], zmq.NOBLOCK)
        except zmq.Again:
            self.counters.add("dropped.slow_link")
        except zmq.ZMQError:  # ROUTER_MANDATORY: the connection is gone
            self.counters.add("dropped.lost_link")
            self._peers.pop(link, None)

    def _forget_unreachable(self) -> None:
        """A grant of nothing, sent to every link, drops those whose connection is gone."""
        for link in list(self._peers):
            self._grant(link, self.incarnation, 0)
