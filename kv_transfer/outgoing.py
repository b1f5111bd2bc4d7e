"""One transfer as its owner sees it: a handle that any thread may use, and the commands it gives to the sender."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.errors import LayoutMismatch
from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, Token, TransferTarget


@dataclass(frozen=True, slots=True)
class TransferOutcome:
    """The last word on a transfer: everything acknowledged, or why not."""

    blocks: int  # blocks the rows of this transfer lie in
    acked: bool = False
    failure: str = ""  # empty when acked
    bytes: int = 0  # of acknowledged rows
    frames: int = 0  # acknowledged fill frames
    last_ack_ns: int | None = None  # Clock.now_ns()


OnDone = Callable[[TransferOutcome], None]


@dataclass(frozen=True, slots=True)
class OpenTransfer:
    """A transfer begins; `on_done` follows exactly once. Only then may what `block_table` names be written again."""

    number: int  # what the sender calls the transfer by
    target: TransferTarget
    block_table: tuple[int, ...]
    request_id: str
    on_done: OnDone


@dataclass(frozen=True, slots=True)
class AddRows:
    """These rows are final in the pool and may leave."""

    number: int
    rows: Extent


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """Every required row has been added."""

    number: int
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class AbortTransfer:
    """The transfer ends, and its receiver is told."""

    number: int
    reason: str
    finished: bool = False  # nothing failed: the request needs no decode


Command = OpenTransfer | AddRows | CommitTransfer | AbortTransfer


@dataclass(frozen=True, eq=False, slots=True)
class OutgoingTransfer:
    """A handle: its methods only hand a command to the sender. They are cheap, and any thread may call them."""

    number: int
    post: Callable[[Command], None]

    def rows_ready(self, plane: str, layer: int, first: int, n: int) -> None:
        """Positions [first, first + n) are final in the pool. Only what the target misses goes out, and only once."""
        self.post(AddRows(self.number, Extent(plane, layer, first, n)))

    def commit(self, *tokens: Token) -> None:
        """Every token so far, after the last required rows. on_done(acked=True) follows when the receiver has claimed.

        Rows of advisory planes may still be added; they reach the receiver in vain once it has claimed.
        """
        self.post(CommitTransfer(self.number, tokens))

    def abort(self, reason: str, *, finished: bool = False) -> None:
        """Ends the transfer and tells the receiver to free; `finished`: the request needs no decode."""
        self.post(AbortTransfer(self.number, reason, finished))


def check_target(target: TransferTarget, layout: KvLayout) -> None:
    """Raises LayoutMismatch, or ValueError for a malformed target."""
    if target.layout_fingerprint != layout.fingerprint:
        raise LayoutMismatch(f"target layout {target.layout_fingerprint[:32]}, this worker {layout.fingerprint}")
    if any(len(bytes.fromhex(name)) != 16 for name in (target.transfer_id, target.receiver_incarnation)):
        raise ValueError("transfer id and receiver incarnation are 32 hex digits")
    if unknown := {extent.plane for extent in target.missing} - {plane.name for plane in layout.planes}:
        raise ValueError(f"the layout has no plane {sorted(unknown)}")


def blocks_of(missing: Sequence[Extent], block_size: int) -> set[int]:
    """Places in the block table that these rows lie in."""
    return {
        block for extent in missing for block in range(extent.first_token // block_size, -(-extent.end // block_size))
    }
