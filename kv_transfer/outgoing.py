"""One transfer as the sending side sees it: a handle any thread may use, and the state the sender's thread keeps."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from isthmus.kv_layout import KvLayout
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.coverage import Coverage
from kv_transfer.messages import MAX_COMMIT_BYTES, Commit

if TYPE_CHECKING:
    from kv_transfer.courier import Courier


@dataclass(frozen=True, slots=True)
class TransferOutcome:
    """The last word on a transfer: everything acknowledged, or why not."""

    acked: bool
    failure: str  # empty when acked
    bytes: int  # of acknowledged rows
    frames: int  # acknowledged fill frames
    blocks: int  # blocks the rows of this transfer lie in
    last_ack_ns: int | None  # CLOCK_MONOTONIC


@dataclass(frozen=True, slots=True)
class TransferOrder:
    target: TransferTarget
    block_table: tuple[int, ...]
    on_done: Callable[[TransferOutcome], None]
    request_id: str = ""


Command = Callable[["Courier"], None]  # run by the sender's thread


class OutgoingTransfer:
    """Public methods only hand a command to the sender's thread; they are cheap and any thread may call them."""

    def __init__(self, order: TransferOrder, layout: KvLayout, post: Callable[[Command], None]):
        self.order = order
        self.state = OutgoingState(order.target.missing, layout.block_size)
        self._post = post

    @property
    def transfer_id(self) -> str:
        return self.order.target.transfer_id

    def rows_ready(self, plane: int, layer: int, first: int, n: int) -> None:
        """Positions [first, first + n) are final in the pool. Only what the target misses goes out, and only once."""
        self._post(lambda courier: courier.add_rows(self, Extent(plane, layer, first, n)))

    def commit(self, *tokens: Token) -> None:
        """Every token so far, after the last rows_ready. on_done(acked=True) follows when the receiver has claimed."""
        self._post(lambda courier: courier.commit(self, tokens))

    def abort(self, reason: str, *, finished: bool = False) -> None:
        """Ends the transfer and tells the receiver to free; `finished`: the request needs no decode."""
        self._post(lambda courier: courier.abort(self, reason, finished=finished))


class OutgoingState:
    """What is queued, under way and acknowledged. Only the sender's thread writes it."""

    def __init__(self, missing: tuple[Extent, ...], block_size: int):
        self.coverage = Coverage(missing)  # of rows handed in
        self.pieces: deque[Extent] = deque()  # rows computed and not sent yet
        self.commit: bytes | None = None  # encoded
        self.commit_sent = False
        self.num_in_flight = 0  # fill frames without an answer
        self.num_borrowed = 0  # frames that ZeroMQ reads straight from the pool
        self.failure: str | None = None  # set when the transfer has ended, empty for success
        self.progress_at = 0.0  # Clock.now() of the last answer, or of the commit
        self.closed = False  # on_done has been called, or is being called
        self._missing = missing
        self._blocks = {block for e in missing for block in range(e.first_token // block_size, -(-e.end // block_size))}
        self._acked_bytes = 0
        self._acked_frames = 0
        self._has_sent = False
        self._last_ack_ns: int | None = None

    @property
    def has_ended(self) -> bool:
        return self.failure is not None

    @property
    def has_work(self) -> bool:
        """Something could be sent now, credit and memory permitting."""
        return not self.has_ended and (bool(self.pieces) or (self.commit is not None and not self.commit_sent))

    def add_rows(self, rows: Extent) -> None:
        interval = (rows.first_token, rows.end)
        for first, end in self.coverage.gaps(rows.plane, rows.layer, interval):
            self.pieces.append(Extent(rows.plane, rows.layer, first, end - first))
        self.coverage.cover(rows.plane, rows.layer, interval)

    def add_commit(self, tokens: tuple[Token, ...]) -> str:
        """Why the commit could not be honoured; empty if it can: it is sent after the rows."""
        if not self.coverage.is_complete:
            return "committed before its rows"
        self.commit = Commit(tokens, self._missing).encode()
        return "" if len(self.commit) <= MAX_COMMIT_BYTES else "too many tokens for a commit"

    def note_sent(self) -> bool:
        """A fill frame leaves; True for the first."""
        self.num_in_flight += 1
        is_first, self._has_sent = not self._has_sent, True
        return is_first

    def note_acked(self, num_bytes: int) -> None:
        self.num_in_flight -= 1
        self._acked_bytes += num_bytes
        self._acked_frames += 1
        self._last_ack_ns = time.monotonic_ns()

    def outcome(self) -> TransferOutcome:
        assert self.failure is not None, "the outcome is known at the end"
        return TransferOutcome(
            acked=not self.failure,
            failure=self.failure,
            bytes=self._acked_bytes,
            frames=self._acked_frames,
            blocks=len(self._blocks),
            last_ack_ns=self._last_ack_ns,
        )
