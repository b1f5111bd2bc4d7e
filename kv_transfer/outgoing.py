"""One transfer as the sending side sees it: a handle any thread may use, and the state the sender's thread keeps."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.coverage import Coverage
from kv_transfer.messages import MAX_COMMIT_BYTES, Commit

if TYPE_CHECKING:
    from kv_transfer.courier import Courier


@dataclass(frozen=True, slots=True)
class TransferOutcome:
    """The last word on a transfer: everything acknowledged, or why not."""

    blocks: int  # blocks the rows of this transfer lie in
    acked: bool = False
    failure: str = ""  # empty when acked
    bytes: int = 0  # of acknowledged rows
    frames: int = 0  # acknowledged fill frames
    last_ack_ns: int | None = None  # CLOCK_MONOTONIC


OnDone = Callable[[TransferOutcome], None]
Command = Callable[["Courier"], None]  # run by the sender's thread


@dataclass(eq=False, slots=True)
class OutgoingTransfer:
    """Public methods only hand a command to the sender's thread; they are cheap and any thread may call them."""

    target: TransferTarget
    block_table: tuple[int, ...]
    on_done: OnDone
    request_id: str
    state: "OutgoingState"
    _post: Callable[[Command], None]

    def rows_ready(self, plane: str, layer: int, first: int, n: int) -> None:
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

    def __init__(self, missing: tuple[Extent, ...], layout: KvLayout):
        self.coverage = Coverage(layout, missing)  # of rows handed in
        self.pieces: deque[Extent] = deque()  # rows computed and not sent yet
        self.commit: bytes | None = None  # encoded
        self.commit_sent = False
        self.num_in_flight = 0  # fill frames of required planes without an answer
        self.num_borrowed = 0  # frames that ZeroMQ reads straight from the pool
        self.has_ended = False
        self.progress_at = 0.0  # Clock.now() of the last answer, or of the commit
        self.closed = False  # on_done has been called, or is being called
        self._missing = missing
        self._layout = layout
        self._has_sent = False
        size = layout.block_size
        blocks = {block for e in missing for block in range(e.first_token // size, -(-e.end // size))}
        self.outcome = TransferOutcome(len(blocks))  # as far as it is known

    @property
    def has_work(self) -> bool:
        """Something could be sent now, credit and memory permitting."""
        return not self.has_ended and (bool(self.pieces) or (self.commit is not None and not self.commit_sent))

    def add_rows(self, rows: Extent) -> None:
        interval = (rows.first_token, rows.end)
        for first, end in self.coverage.gaps(rows.place, interval):
            self.pieces.append(Extent(*rows.place, first, end - first))
        self.coverage.cover(rows.place, interval)

    def add_commit(self, tokens: tuple[Token, ...]) -> str:
        """Why the commit could not be honoured; empty if it can: it is sent after the rows.

        It rests on rows of required planes only: a receiver that has other advisory planes agrees with it.
        """
        if not self.coverage.is_complete:
            return "committed before its rows"
        self.commit = Commit(tokens, self._layout.required(self._missing)).encode(self._layout)
        return "" if len(self.commit) <= MAX_COMMIT_BYTES else "too many tokens for a commit"

    def note_sent(self, plane: str) -> bool:
        """A fill frame leaves; True for the first."""
        self.num_in_flight += not self._layout.plane(plane).advisory
        is_first, self._has_sent = not self._has_sent, True
        return is_first

    def note_acked(self, plane: str, num_bytes: int) -> None:
        self.num_in_flight -= not self._layout.plane(plane).advisory
        num_bytes, num_frames = self.outcome.bytes + num_bytes, self.outcome.frames + 1
        self.outcome = replace(self.outcome, bytes=num_bytes, frames=num_frames, last_ack_ns=time.monotonic_ns())

    def end(self, failure: str) -> None:
        """`failure` is empty for success."""
        self.has_ended = True
        self.outcome = replace(self.outcome, acked=not failure, failure=failure)
        self.pieces.clear()
