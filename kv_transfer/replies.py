"""What a receiver answers: acks with credit, and refusals, each on the link its frame came from."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kv_transfer.counters import Counters
from kv_transfer.frames import NO_TRANSFER, BadFrame, FrameHeader, FrameKind, FrameName, Refusal, seal
from kv_transfer.messages import Abort, encode_credit
from kv_transfer.peers import Peer


@dataclass(frozen=True, slots=True)
class Reply:
    """One message to a link."""

    link: bytes
    header: bytes  # sealed
    body: bytes


@dataclass(eq=False, slots=True)
class Replies:
    """At most `max_peers` links, each with `window_bytes` of credit: what an honest sender can make a receiver hold.

    Written by `receiver_core.ReceiverCore` only. Acks are gathered and leave with `flush`, at the end of a burst of
    messages, or when a quarter of the window is owed. `post` sends a message; one that could not be sent is told by
    `not_sent`, before the next call of `admit` or `resolve`.
    """

    post: Callable[[Reply], None]
    incarnation: bytes  # this receiver's
    fingerprint: bytes  # of its layout
    counters: Counters
    window_bytes: int
    max_peers: int
    _peers: dict[bytes, Peer] = field(default_factory=dict[bytes, Peer], init=False)  # by link
    # Links with something to be told, in order; a dict for want of an ordered set.
    _waiting: dict[bytes, None] = field(default_factory=dict[bytes, None], init=False)
    _asking: tuple[bytes, FrameHeader] | None = field(default=None, init=False)  # no room, unless another link is gone

    def admit(self, link: bytes, header: FrameHeader) -> None:
        """Grants the window to a link that asks, nothing when it asks again.

        When all places are taken every link is sent a grant of nothing, which shows those whose connection is gone;
        `resolve` then has the answer.
        """
        if link in self._peers:
            self._grant(link, header.sender, 0)
        elif len(self._peers) < self.max_peers:
            self._peers[link] = Peer(header.sender, self.window_bytes)
            self._grant(link, header.sender, self.window_bytes)
        else:
            for other in self._peers:
                self._grant(other, self.incarnation, 0)
            self._asking = (link, header)

    def resolve(self) -> None:
        """Admits the link that had to wait if there is room by now, and refuses it otherwise."""
        if self._asking is None:
            return
        link, header = self._asking
        self._asking = None
        if len(self._peers) < self.max_peers:
            self.admit(link, header)
        else:
            self.refuse(link, header, Refusal.TOO_MANY_PEERS)

    def spend(self, link: bytes, sender: bytes, num_bytes: int) -> None:
        """Raises BadFrame for a link that has no credit for what it sent, or speaks for another incarnation."""
        peer = self._peers.get(link)
        if peer is None or not peer.spend(num_bytes):
            raise BadFrame(Refusal.NO_CREDIT)
        self._waiting[link] = None
        if peer.incarnation != sender:
            raise BadFrame(Refusal.WRONG_SENDER)

    def ack(self, link: bytes, name: FrameName) -> None:
        """The frame is accepted; its sender is told by the next flush."""
        peer = self._peers.get(link)
        if peer is None:
            return
        peer.accepted.append(name)
        self._waiting[link] = None
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
        """Every link is told what it has not been told yet."""
        for link in self._waiting:
            self._flush_link(link)
        self._waiting.clear()

    def not_sent(self, link: bytes, *, is_lost: bool) -> None:
        """A message was dropped: the link does not read, or its connection is gone."""
        self.counters.add("dropped.lost_link" if is_lost else "dropped.slow_link")
        if is_lost:
            self._peers.pop(link, None)

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
        header = FrameHeader(
            kind,
            self.fingerprint,
            self.incarnation,
            receiver,
            transfer=name.transfer,
            attempt=name.attempt,
            plane=name.plane,
            layer=name.layer,
            first_token=name.first_token,
            num_tokens=name.num_tokens,
            body_bytes=len(body),
        )
        self.post(Reply(link, seal(header, body), body))
