"""What a receiver answers: acks, refusals and credit, each on the link its frame came from."""

from collections.abc import Callable
from dataclasses import replace

import zmq

from kv_transfer.counters import Counters
from kv_transfer.frames import BadFrame, FrameHeader, FrameKind, Refusal, seal
from kv_transfer.messages import Abort, encode_ack, encode_credit
from kv_transfer.peers import Peers

Post = Callable[[bytes, bytes, bytes], None]  # routing id, header, body; raises zmq.ZMQError


class Replies:
    """Never blocks: an answer to a link that is gone or does not read is dropped and counted. One thread."""

    def __init__(self, post: Post, incarnation: bytes, fingerprint: bytes, peers: Peers, counters: Counters):
        self._post = post
        self._incarnation = incarnation
        self._fingerprint = fingerprint
        self._peers = peers
        self._counters = counters

    def ack(self, link: bytes, header: FrameHeader) -> None:
        """The frame is accepted; the answer echoes its range."""
        self._answer(link, header, FrameKind.ACK, encode_ack(header.kind))

    def refuse(self, link: bytes, header: FrameHeader, refusal: Refusal) -> None:
        self._counters.add(f"refused.{refusal.value}")
        self._answer(link, header, FrameKind.ABORT, Abort(refusal.value, refused=header.kind).encode())

    def ack_commit(self, link: bytes, transfer: bytes, attempt: int) -> None:
        header = FrameHeader(FrameKind.COMMIT, self._fingerprint, bytes(16), bytes(16), transfer, attempt)
        self.ack(link, header)

    def abort(self, link: bytes, transfer: bytes, attempt: int, cause: str) -> None:
        """Tells the sender that the transfer ended here."""
        header = FrameHeader(FrameKind.ABORT, self._fingerprint, bytes(16), bytes(16), transfer, attempt)
        self._answer(link, header, FrameKind.ABORT, Abort(cause).encode())

    def admit(self, link: bytes, header: FrameHeader) -> None:
        """A link asks for credit. Raises BadFrame when there is no room for one more."""
        if self._peers.is_full and self._peers.find(link) is None:
            self._forget_unreachable()
            if self._peers.is_full:
                raise BadFrame(Refusal.TOO_MANY_PEERS)
        self._grant(link, self._peers.admit(link, header.sender))

    def spend(self, link: bytes, sender: bytes, num_bytes: int) -> None:
        """Raises BadFrame for a link that has no credit for what it sent, or speaks for another incarnation."""
        peer = self._peers.find(link)
        if peer is None or not self._peers.spend(peer, num_bytes):
            raise BadFrame(Refusal.NO_CREDIT)
        if peer.incarnation != sender:
            raise BadFrame(Refusal.WRONG_SENDER)

    def grant_owed(self, link: bytes) -> None:
        peer = self._peers.find(link)
        if peer is not None and (num_bytes := self._peers.take_grant(peer)):
            self._grant(link, num_bytes)

    def _grant(self, link: bytes, num_bytes: int) -> None:
        peer = self._peers.find(link)
        assert peer is not None, "credit is granted to admitted links"
        header = FrameHeader(FrameKind.CREDIT, self._fingerprint, self._incarnation, peer.incarnation)
        self._send(link, header, encode_credit(num_bytes))

    def _answer(self, link: bytes, header: FrameHeader, kind: FrameKind, body: bytes) -> None:
        peer = self._peers.find(link)
        receiver = peer.incarnation if peer else header.sender
        echo = replace(header, kind=kind, fingerprint=self._fingerprint, sender=self._incarnation, receiver=receiver)
        self._send(link, echo, body)

    def _send(self, link: bytes, header: FrameHeader, body: bytes) -> None:
        try:
            self._post(link, seal(replace(header, body_bytes=len(body)), body), body)
        except zmq.Again:
            self._counters.add("dropped.slow_link")
        except zmq.ZMQError:  # ROUTER_MANDATORY: the connection is gone
            self._counters.add("dropped.lost_link")
            self._peers.drop(link)

    def _forget_unreachable(self) -> None:
        """A grant of nothing, sent to every link, drops those whose connection is gone."""
        for link in self._peers.routing_ids():
            self._grant(link, 0)
