"""What a receiver tells the decode service, and how it is set up."""

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.types import Extent, Token
from kv_transfer.transfers import IncomingTransfer, StateChange


@dataclass(frozen=True, slots=True)
class ClaimedTransfer:
    transfer_id: str
    request_id: str
    tokens: tuple[Token, ...]  # from token 0 on; one unless the stream moved here


@dataclass(frozen=True, slots=True)
class FailedTransfer:
    """The attempt is over. The reservation stays for another one, unless `is_ended`."""

    transfer_id: str
    request_id: str
    attempt: int
    missing: tuple[Extent, ...]
    reason: str  # "fill_deadline", or the sender's own words
    is_ended: bool  # nothing more may be written
    finished: bool = False  # nothing failed: the request ended at token 0 and needs no decode

    @classmethod
    def of(cls, transfer: IncomingTransfer, reason: str, *, finished: bool = False) -> "FailedTransfer":
        ids = (transfer.transfer_id, transfer.request_id, transfer.attempt)
        return cls(*ids, transfer.coverage.missing(), reason, transfer.state.is_final, finished)


@dataclass(frozen=True, slots=True)
class TransferEvents:
    """Called from the receiver's thread outside its lock; must not block.

    A transfer cancelled by another thread at the same moment may still be reported: the owner knows it no longer.
    `on_state` hears every state change in order, from the thread that made it, under the lock: it may only hand it on.
    """

    on_ready: Callable[[ClaimedTransfer], None]
    on_failed: Callable[[FailedTransfer], None]
    on_state: Callable[[StateChange], object] = lambda _: None


@dataclass(frozen=True, slots=True)
class ReceiverOptions:
    host: str = "127.0.0.1"
    port: int = 0  # 0: a free one
    credit_bytes: int = 16 * 2**20  # per sender
    max_peers: int = 256
    max_transfers: int = 1024


DEFAULT_OPTIONS = ReceiverOptions()
