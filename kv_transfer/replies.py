"""What a receiver answers: acks with credit, and refusals, each on the link its frame came from."""

import zmq

from kv_transfer.counters import Counters
from kv_transfer.frames import NO_TRANSFER, BadFrame, FrameHeader, FrameKind, FrameName, Refusal, seal
from kv_transfer.messages import Abort, encode_credit
from kv_transfer.peers import Peer, Peers
from kv_transfer.sockets import Socket


class Replies:
    """Never blocks: an answer to a link that is gone or does not read is dropped and counted. One thread.

    Acks are gathered and sent by `flush`, at the end of a burst of messages or when a quarter of the window is owed.
    """

    def __init__(self, socket: Socket, incarnation: bytes, fingerprint: bytes, peers: Peers, counters: Counters):
        self._socket = socket
        self._incarnation = incarnation
        self._fingerprint = fingerprint
        self._peers = peers
        self._counters = counters
        self._waiting: set[bytes] = set()  # links with something to be told

    def admit(self, link: bytes, header: FrameHeader) -> None:
        """A link asks for credit. Raises BadFrame when there is no room for one more."""
        if self._peers.is_full and self._peers.find(link) is None:
            self._forget_unreachable()
            if self._peers.is_full:
                raise BadFrame(Refusal.TOO_MANY_PEERS)
        self._grant(link, header.sender, self._peers.admit(link, header.sender))

    def spend(self, link: bytes, sender: bytes, num_bytes: int) -> None:
        """Raises BadFrame for a link that has no credit for what it sent, or speaks for another incarnation."""
        peer = self._peers.find(link)
        if peer is None or not self._peers.spend(peer, num_bytes):
            raise BadFrame(Refusal.NO_CREDIT)
        self._waiting.add(link)
        if peer.incarnation != sender:
            raise BadFrame(Refusal.WRONG_SENDER)

    def ack(self, link: bytes, name: FrameName) -> None:
        """The frame is accepted; its sender is told by the next flush."""
        if (peer := self._peers.find(link)) is not None:
            peer.accepted.append(name)
            self._waiting.add(link)
            if self._peers.is_answer_due(peer):
                self._flush_link(link, peer)

    def refuse(self, link: bytes, header: FrameHeader, refusal: Refusal) -> None:
        self._counters.add(f"refused.{refusal.value}")
        self._abort(link, header, Abort(refusal.value, refused=header.kind))

    def abort(self, link: bytes, transfer: bytes, attempt: int, cause: str) -> None:
        """Tells the sender that the transfer ended here."""
        peer = self._peers.find(link)
        if peer is not None:
            header = FrameHeader(FrameKind.ABORT, self._fingerprint, peer.incarnation, bytes(16), transfer, attempt)
            self._abort(link, header, Abort(cause))

    def flush(self) -> None:
        while self._waiting:
            link = self._waiting.pop()
            if (peer := self._peers.find(link)) is not None:
                self._flush_link(link, peer)

    def _flush_link(self, link: bytes, peer: Peer) -> None:
        if (answer := self._peers.take_answer(peer)) is not None:
            self._send(link, FrameKind.ACK, peer.incarnation, FrameName(0, NO_TRANSFER, 0), answer.encode())

    def _abort(self, link: bytes, about: FrameHeader, abort: Abort) -> None:
        """Echoes the frame's name to whoever sent it, after the acks that came before."""
        if (peer := self._peers.find(link)) is not None:
            self._flush_link(link, peer)
        self._send(link, FrameKind.ABORT, about.sender, about.name, abort.encode())

    def _grant(self, link: bytes, incarnation: bytes, num_bytes: int) -> None:
        self._send(link, FrameKind.CREDIT, incarnation, FrameName(0, NO_TRANSFER, 0), encode_credit(num_bytes))

    def _send(self, link: bytes, kind: FrameKind, receiver: bytes, name: FrameName, body: bytes) -> None:
        _, transfer, attempt, *place = name
        ends = (self._fingerprint, self._incarnation, receiver)
        header = FrameHeader(kind, *ends, transfer, attempt, *place, body_bytes=len(body))
        try:
            self._socket.send_multipart([link, seal(header, body), body], zmq.NOBLOCK)
        except zmq.Again:
            self._counters.add("dropped.slow_link")
        except zmq.ZMQError:  # ROUTER_MANDATORY: the connection is gone
            self._counters.add("dropped.lost_link")
            self._peers.drop(link)

    def _forget_unreachable(self) -> None:
        """A grant of nothing, sent to every link, drops those whose connection is gone."""
        for link in self._peers.routing_ids():
            self._grant(link, self._incarnation, 0)
