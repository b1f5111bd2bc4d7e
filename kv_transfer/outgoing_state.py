"""What the sender knows of one of its transfers: rows queued, under way and acknowledged."""

from collections import deque
from dataclasses import replace
from math import inf

from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, Token
from kv_transfer.coverage import Coverage
from kv_transfer.messages import MAX_COMMIT_BYTES, Commit
from kv_transfer.outgoing import OpenTransfer, TransferOutcome, blocks_of


class OutgoingState:
    """Written by `sender_core.SenderCore` and the parts it owns, and by nobody else."""

    def __init__(self, opened: OpenTransfer, layout: KvLayout):
        self.opened = opened
        self.pieces: deque[Extent] = deque()  # rows computed and not sent yet
        self.commit: bytes | None = None  # encoded
        self.commit_sent = False
        self.num_in_flight = 0  # fill frames of required planes without an answer
        self.num_borrowed = 0  # frames that a wire reads straight from the pool
        self.has_ended = False
        self.is_reported = False  # on_done has been called, or is being called
        self.progress_at = 0.0  # when the last answer came, or when the commit was given
        missing = opened.target.missing
        self.outcome = TransferOutcome(len(blocks_of(missing, layout.block_size)))  # as far as it is known
        self._layout = layout
        self._coverage = Coverage(layout, missing)  # of rows handed in
        self._has_sent = False

    @property
    def has_work(self) -> bool:
        """Something could be sent now, credit and memory permitting."""
        return not self.has_ended and (bool(self.pieces) or (self.commit is not None and not self.commit_sent))

    def add_rows(self, rows: Extent) -> None:
        """Queues what the receiver misses of them, each position once."""
        interval = (rows.first_token, rows.end)
        for first, end in self._coverage.gaps(rows.place, interval):
            self.pieces.append(Extent(*rows.place, first, end - first))
        self._coverage.cover(rows.place, interval)

    def add_commit(self, tokens: tuple[Token, ...], now: float) -> str:
        """Why the commit could not be honoured; empty if it can: it is sent after the rows.

        It rests on rows of required planes only: a receiver that has other advisory planes agrees with it.
        """
        self.progress_at = now
        if not self._coverage.is_complete:
            return "committed before its rows"
        required = self._layout.required(self.opened.target.missing)
        self.commit = Commit(tokens, required).encode(self._layout)
        return "" if len(self.commit) <= MAX_COMMIT_BYTES else "too many tokens for a commit"

    def take_piece(self, num_tokens: int) -> None:
        """The first `num_tokens` rows of the first piece are out of the queue."""
        piece = self.pieces.popleft()
        if num_tokens < piece.num_tokens:
            rest = replace(piece, first_token=piece.first_token + num_tokens, num_tokens=piece.num_tokens - num_tokens)
            self.pieces.appendleft(rest)

    def note_sent(self, plane: str) -> bool:
        """A fill frame leaves; True for the transfer's first."""
        self.num_in_flight += self._counted(plane)
        is_first = not self._has_sent
        self._has_sent = True
        return is_first

    def note_commit_sent(self, now: float) -> None:
        self.commit_sent = True
        self.progress_at = now

    def note_acked(self, plane: str, num_bytes: int, now: float) -> None:
        """A fill frame was acknowledged."""
        self.num_in_flight -= self._counted(plane)
        self.progress_at = now
        self.outcome = replace(
            self.outcome,
            bytes=self.outcome.bytes + num_bytes,
            frames=self.outcome.frames + 1,
            last_ack_ns=round(now * 1e9),
        )

    def note_refused(self, plane: str) -> None:
        """A fill frame was refused."""
        self.num_in_flight -= self._counted(plane)

    def commit_due(self, timeout_s: float) -> float:
        """When the commit's acknowledgement is too late; every fill frame before it has been answered."""
        return self.progress_at + timeout_s if self.commit_sent and not self.num_in_flight else inf

    def end(self, failure: str) -> None:
        """`failure` is empty for success."""
        self.has_ended = True
        self.outcome = replace(self.outcome, acked=not failure, failure=failure)
        self.pieces.clear()

    def _counted(self, plane: str) -> int:
        """1 for a frame on whose answer the transfer depends."""
        return 0 if self._layout.plane(plane).advisory else 1
