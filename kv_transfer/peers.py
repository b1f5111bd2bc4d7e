"""Byte credit of a link that sends to a receiver: how much it may still send, and what it is owed."""

from dataclasses import dataclass, field

from kv_transfer.frames import FrameName
from kv_transfer.messages import MAX_ACKS, Acks


@dataclass(slots=True)
class Peer:
    """One connection, from its first credit request on; a sender incarnation speaks for itself only.

    What it has and what it is owed make its window together. Written by `replies.Replies` only, through its methods.
    """

    incarnation: bytes
    credit_bytes: int  # granted and not yet used
    owed_bytes: int = 0  # taken in and not yet granted again
    accepted: list[FrameName] = field(default_factory=list[FrameName])  # not yet told to the sender

    def spend(self, num_bytes: int) -> bool:
        """A body has come, wanted or not. False: the link had no credit for it."""
        if num_bytes > self.credit_bytes:
            return False
        self.credit_bytes -= num_bytes
        self.owed_bytes += num_bytes
        return True

    @property
    def is_answer_due(self) -> bool:
        """More must not wait for the end of the burst: a quarter of the window is owed, or the answer is full."""
        return self.owed_bytes * 4 >= self.credit_bytes + self.owed_bytes or len(self.accepted) == MAX_ACKS

    def take_answer(self) -> Acks | None:
        """What the link has not been told yet; everything it is owed is granted with it."""
        if not self.accepted and not self.owed_bytes:
            return None
        answer = Acks(self.owed_bytes, tuple(self.accepted))
        self.credit_bytes += self.owed_bytes
        self.owed_bytes = 0
        self.accepted.clear()
        return answer
