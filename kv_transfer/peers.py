"""Byte credit of the links that send to a receiver: how much each may still send, and what it is owed."""

from dataclasses import dataclass, field

from kv_transfer.frames import FrameName
from kv_transfer.messages import MAX_ACKS, Acks


@dataclass(slots=True)
class Peer:
    """One ZeroMQ connection, from its first credit request on; a sender incarnation speaks for itself only."""

    incarnation: bytes
    credit_bytes: int  # granted and not yet used
    owed_bytes: int = 0  # taken in and not yet granted again
    accepted: list[FrameName] = field(default_factory=list[FrameName])  # not yet told to the sender


class Peers:
    """At most `max_peers` links, each with `window_bytes` of credit: what an honest sender can make a receiver hold."""

    def __init__(self, window_bytes: int, max_peers: int):
        self._window_bytes = window_bytes
        self._max_peers = max_peers
        self._peers: dict[bytes, Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def is_full(self) -> bool:
        return len(self._peers) >= self._max_peers

    def routing_ids(self) -> list[bytes]:
        return list(self._peers)

    def find(self, routing_id: bytes) -> Peer | None:
        return self._peers.get(routing_id)

    def admit(self, routing_id: bytes, incarnation: bytes) -> int:
        """Bytes to grant to a link that asks: the window for a new one, nothing for one that asks again."""
        if routing_id in self._peers:
            return 0
        self._peers[routing_id] = Peer(incarnation, self._window_bytes)
        return self._window_bytes

    def spend(self, peer: Peer, num_bytes: int) -> bool:
        """A body has come, wanted or not. False: the link had no credit for it."""
        if num_bytes > peer.credit_bytes:
            return False
        peer.credit_bytes -= num_bytes
        peer.owed_bytes += num_bytes
        return True

    def is_answer_due(self, peer: Peer) -> bool:
        """More must not wait for the end of the burst: a quarter of the window is owed, or the answer is full."""
        return peer.owed_bytes * 4 >= self._window_bytes or len(peer.accepted) == MAX_ACKS

    def take_answer(self, peer: Peer) -> Acks | None:
        """What the link has not been told yet; everything it is owed is granted with it."""
        if not peer.accepted and not peer.owed_bytes:
            return None
        answer = Acks(peer.owed_bytes, tuple(peer.accepted))
        peer.credit_bytes += peer.owed_bytes
        peer.owed_bytes = 0
        peer.accepted.clear()
        return answer

    def drop(self, routing_id: bytes) -> None:
        self._peers.pop(routing_id, None)
