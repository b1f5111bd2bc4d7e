"""A sender's connection to one receiver incarnation: credit, frames under way, and what may be believed of answers."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, TransferTarget
from kv_transfer.frames import MAX_BODY_BYTES, Buffer, FrameHeader, FrameKind, FrameName, is_intact, seal
from kv_transfer.messages import encode_credit
from kv_transfer.outgoing_state import OutgoingState
from kv_transfer.sender_options import SenderOptions
from kv_transfer.staging import StagingSlot
from kv_transfer.wire import LinkLost, Reading, Wire


@dataclass(frozen=True, slots=True)
class InFlight:
    """A fill frame without an answer. Its memory may change after the answer, or once a closed wire has let go."""

    transfer: OutgoingState
    plane: str
    num_bytes: int
    slot: StagingSlot | None  # None: sent straight from the pool
    reading: Reading


class Link:
    """Written by `sender_core.SenderCore` and the parts it owns, and by nobody else."""

    def __init__(self, wire: Wire, sender: bytes, target: TransferTarget, layout: KvLayout, now: float):
        """Raises ValueError for ids that are not hex."""
        self.wire = wire
        self.credit_bytes = 0
        self.max_body_bytes = MAX_BODY_BYTES
        self.in_flight: dict[FrameName, InFlight] = {}
        self.transfers: dict[int, OutgoingState] = {}  # those that have not ended, by number
        self.ready: deque[OutgoingState] = deque()  # those with work, each once, in turn
        self.waiting_since: float | None = None  # an answer or credit is due since then
        self.used_at = now  # when the last transfer ended
        self._layout = layout
        self._has_window = False
        fingerprint = bytes.fromhex(target.layout_fingerprint)
        receiver = bytes.fromhex(target.receiver_incarnation)
        self._blank = FrameHeader(FrameKind.CREDIT, fingerprint, sender, receiver)  # what all headers have in common

    def ask_credit(self) -> None:
        """The first thing said on a link. Raises LinkLost."""
        self.send_small(FrameKind.CREDIT, encode_credit(0))

    def send_small(self, kind: FrameKind, body: bytes, target: TransferTarget | None = None) -> None:
        """Commit, abort or a request for credit: these need none. Raises LinkLost."""
        header = self._header(kind, body, target)
        self.wire.send(seal(header, body), body)

    def send_rows(self, target: TransferTarget, rows: Extent, body: Buffer) -> tuple[FrameName, Reading]:
        """What an answer will call the frame by, and the wire's hold on the body. Raises LinkLost."""
        header = self._header(
            FrameKind.FILL,
            body,
            target,
            plane=self._layout.number_of(rows.plane),
            layer=rows.layer,
            first_token=rows.first_token,
            num_tokens=rows.num_tokens,
        )
        reading = self.wire.send_rows(seal(header, body), body)
        self.credit_bytes -= len(body)
        return header.name, reading

    def verified(self, parts: Sequence[bytes]) -> tuple[FrameHeader, bytes]:
        """An answer as header and body. Raises LinkLost or BadFrame for what our receiver would not send."""
        header = FrameHeader.decode(parts[0])
        if len(parts) != 2 or not is_intact(parts[0], parts[1]):
            raise LinkLost("bad answer: damaged")
        ours = self._blank
        is_ours = (header.sender, header.receiver, header.fingerprint) == (ours.receiver, ours.sender, ours.fingerprint)
        if not is_ours and header.kind is not FrameKind.ABORT:  # a refusal may come from whoever lives there now
            raise LinkLost("bad answer: of somebody else")
        return header, parts[1]

    def take_credit(self, num_bytes: int) -> None:
        """The first grant is the whole window."""
        if not self._has_window:
            self._has_window = True
            # At most half the window: the rest is granted again while a frame is under way.
            self.max_body_bytes = min(MAX_BODY_BYTES, max(num_bytes // 2, 1))
        self.credit_bytes += num_bytes

    def await_since(self, now: float) -> None:
        """An answer or credit is due from now on, if it was not before."""
        if self.waiting_since is None:
            self.waiting_since = now

    def note_answer(self, now: float) -> None:
        """An answer came; the wait starts again if more is due."""
        self.waiting_since = now if self.in_flight else None

    def given_up(self, options: SenderOptions) -> tuple[float, str]:
        """When the link goes, as things are, and why: an answer that is due does not come, or nobody uses it."""
        unanswered = inf if self.waiting_since is None else self.waiting_since + options.ack_timeout_s
        unused = inf if self.transfers or self.in_flight else self.used_at + options.idle_link_s
        return min((unanswered, "no answer"), (unused, "idle"))

    def queue(self, transfer: OutgoingState) -> None:
        """It gets its turn, if it has something to send."""
        if transfer.has_work and transfer not in self.ready:
            self.ready.append(transfer)

    def find(self, name: FrameName) -> OutgoingState | None:
        """The open transfer that a frame of this name is about."""
        for transfer in self.transfers.values():
            target = transfer.opened.target
            if (target.transfer_id, target.attempt) == (name.transfer.hex(), name.attempt):
                return transfer
        return None

    def _header(self, kind: FrameKind, body: Buffer, target: TransferTarget | None, **place: int) -> FrameHeader:
        fields: dict[str, Any] = {**place, "body_bytes": len(body)}
        if target is not None:
            fields |= {"transfer": bytes.fromhex(target.transfer_id), "attempt": target.attempt}
        return replace(self._blank, kind=kind, **fields)


def first_frame(piece: Extent, row_bytes: int, max_bytes: int) -> Extent:
    """As many rows of the piece as a frame of `max_bytes` holds, from the first on; one at least."""
    return replace(piece, num_tokens=min(piece.num_tokens, max(1, max_bytes // row_bytes)))
