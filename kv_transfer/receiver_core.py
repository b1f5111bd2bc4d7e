"""The decode side of transfers: what a message may do, what is answered, and what the decode service is told."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isthmus.kv.layout import KvLayout
from isthmus.ledger import Ledger
from isthmus.types import Extent
from kv_transfer.counters import Counters
from kv_transfer.frames import BadFrame, Buffer, FrameHeader, FrameKind, FrameName, Refusal, is_intact
from kv_transfer.messages import Abort, Commit, decode_credit
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions
from kv_transfer.replies import Replies, Reply
from kv_transfer.transfers import Accept, IncomingTransfer, IncomingTransfers, Reservation, StateChange


@dataclass(frozen=True, slots=True)
class Write:
    """A FILL that may be written: its checksum is verified, then its rows are copied into the gaps, then `written`."""

    link: bytes
    header: FrameHeader
    accept: Accept

    @property
    def transfer_id(self) -> str:
        return self.header.transfer_id


class ReceiverCore:
    """Takes messages and calls, each with the time; what goes out waits in `outbox`, in order.

    One caller at a time: the driver calls under its lock, whatever its thread. It empties the outbox after each call,
    before it hands in the next message, and tells `not_sent` of what it could not send. It calls only `on_state` from
    within a call.
    """

    def __init__(
        self,
        incarnation: bytes,
        layout: KvLayout,
        ledger: Ledger,
        on_state: Callable[[StateChange], object],
        options: ReceiverOptions,
    ):
        self.counters = Counters()
        self.outbox: deque[Reply | ClaimedTransfer | FailedTransfer] = deque()
        self._incarnation = incarnation
        self._layout = layout
        self._fingerprint = bytes.fromhex(layout.fingerprint)
        self._ledger = ledger
        self._on_state = on_state
        self._link_of: dict[str, bytes] = {}  # open transfer -> link that last brought a verified frame
        self._claimed: deque[IncomingTransfer] = deque()  # not reported yet
        self._transfers = IncomingTransfers(layout, self._note_change, options.max_transfers)
        widest = max(plane.row_bytes for plane in layout.planes)
        self._replies = Replies(
            self.outbox.append,
            incarnation,
            self._fingerprint,
            self.counters,
            window_bytes=max(options.credit_bytes, 4 * widest),
            max_peers=options.max_peers,
        )

    def reserve(self, reservation: Reservation) -> None:
        """Rows of `reservation.missing` may now be written. Raises as IncomingTransfers.reserve."""
        self._transfers.reserve(reservation)

    def rearm(self, transfer_id: str, attempt: int, deadline: float) -> tuple[Extent, ...]:
        """As IncomingTransfers.rearm. No row of the transfer may be under way into memory."""
        return self._transfers.rearm(transfer_id, attempt, deadline)

    def cancel(self, transfer_id: str, cause: str, now: float) -> bool:
        """True if the transfer was open, claimed or not; an id not seen yet is refused when it comes."""
        released = self._transfers.release(transfer_id, now)
        return (released or self._transfers.abort(transfer_id, cause, now)) is not None

    def release(self, transfer_id: str, now: float) -> bool:
        """The claimed transfer's request ended. False if it was not claimed."""
        return self._transfers.release(transfer_id, now) is not None

    def restate(self) -> None:
        """Every open transfer goes to on_state as it is now, as a change from None."""
        for transfer in self._transfers:
            self._on_state(StateChange(transfer, None))

    def received(self, link: bytes, parts: Sequence[Buffer], now: float) -> Write | None:
        """One message, checked in full before memory is touched. A refusal changes nothing but a counter."""
        self._replies.resolve()
        try:
            if len(parts) != 2:  # header, body
                raise BadFrame(Refusal.MALFORMED)
            header = FrameHeader.decode(parts[0])
        except BadFrame as bad:  # nothing in it can be believed, not even which transfer to answer about
            self.counters.add(f"refused.{bad.refusal.value}")
            return None
        try:
            self._check_link(link, header, len(parts[1]))
            if header.kind is FrameKind.FILL:
                return Write(link, header, self._transfers.check_fill(header))
            if not is_intact(parts[0], parts[1]):
                raise BadFrame(Refusal.BAD_CHECKSUM)
            self._act(link, header, parts[1], now)
        except BadFrame as bad:
            self._replies.refuse(link, header, bad.refusal)
        self._report_claims()
        return None

    def written(self, write: Write, *, intact: bool) -> None:
        """The checksum was verified; if it held, the rows are in memory."""
        header = write.header
        try:
            if not intact:
                raise BadFrame(Refusal.BAD_CHECKSUM)
            was_covered = write.accept.transfer.is_covered
            transfer = self._transfers.filled(header).transfer
        except BadFrame as bad:
            self._replies.refuse(write.link, header, bad.refusal)
            return
        self._link_of[header.transfer_id] = write.link
        self._replies.ack(write.link, header.name)
        if not was_covered and transfer.is_covered:
            self._record("transfer.covered", transfer)
        self._report_claims()

    def failed(self, link: bytes, parts: Sequence[Buffer], cause: str) -> None:
        """Acting on a message raised what it should not."""
        header = FrameHeader.decode(parts[0])
        self._ledger.record("transfer.error", transfer_id=header.transfer_id, cause=cause)
        self._replies.refuse(link, header, Refusal.INTERNAL)
        self._report_claims()

    def not_sent(self, link: bytes, *, is_lost: bool) -> None:
        """A reply was dropped: the link does not read, or its connection is gone."""
        self._replies.not_sent(link, is_lost=is_lost)

    def tick(self, now: float) -> float | None:
        """After a burst of messages, and at the moment that the last tick returned, if it did."""
        self._replies.resolve()
        for transfer in self._transfers.expire(now):
            self._report_failure(FailedTransfer.of(transfer, "fill_deadline"))
        self._replies.flush()
        return self._transfers.next_due

    def _check_link(self, link: bytes, header: FrameHeader, body_bytes: int) -> None:
        if header.kind is not FrameKind.CREDIT:
            self._replies.spend(link, header.sender, body_bytes if header.kind is FrameKind.FILL else 0)
        if header.fingerprint != self._fingerprint:
            raise BadFrame(Refusal.LAYOUT_MISMATCH)
        if header.receiver != self._incarnation:
            raise BadFrame(Refusal.STALE_OWNER)
        if header.body_bytes != body_bytes:
            raise BadFrame(Refusal.BAD_BODY)

    def _act(self, link: bytes, header: FrameHeader, body: Buffer, now: float) -> None:
        if header.kind is FrameKind.COMMIT:
            self._commit(link, header, body)
        elif header.kind is FrameKind.ABORT:
            self._abort(link, header, body, now)
        elif header.kind is FrameKind.CREDIT and decode_credit(body) == 0:
            self._replies.admit(link, header)
        else:
            raise BadFrame(Refusal.BAD_KIND)

    def _commit(self, link: bytes, header: FrameHeader, body: Buffer) -> None:
        commit = Commit.decode(body, self._layout)
        had_claimed = self._transfers.committed(header, commit)
        self._link_of[header.transfer_id] = link
        if had_claimed:  # otherwise acknowledged when the rows are there
            self._replies.ack(link, header.name)

    def _abort(self, link: bytes, header: FrameHeader, body: Buffer, now: float) -> None:
        """A sender that fails leaves the reservation to another; one whose request has finished ends it."""
        notice = Abort.decode(body)
        self._transfers.check(header)
        self._link_of.pop(header.transfer_id, None)  # the sender knows
        if notice.finished:
            left = self._transfers.abort(header.transfer_id, notice.cause, now)
        else:
            left = self._transfers.abandon(header.transfer_id)
            if left is not None:
                self._record("transfer.abandoned", left, notice.cause)
        self._replies.ack(link, header.name)
        if left is not None:
            self._report_failure(FailedTransfer.of(left, notice.cause, finished=notice.finished))

    def _report_claims(self) -> None:
        while self._claimed:
            transfer = self._claimed.popleft()
            link = self._link_of.get(transfer.transfer_id)
            if link is None:  # released by whoever heard of the claim as a state change
                continue
            assert transfer.commit is not None, "claimed by its commit"
            name = FrameName(FrameKind.COMMIT.value, bytes.fromhex(transfer.transfer_id), transfer.attempt)
            self._replies.ack(link, name)
            claim = ClaimedTransfer(transfer.transfer_id, transfer.request_id, transfer.commit.tokens)
            self.outbox.append(claim)

    def _report_failure(self, failure: FailedTransfer) -> None:
        self.counters.add("finished" if failure.finished else "failed")
        self.outbox.append(failure)

    def _note_change(self, change: StateChange) -> None:
        """From within whichever call made the change."""
        transfer = change.transfer
        state = transfer.state
        event = change.cause if change.previous is state else state.value.lower()
        self._record(f"handoff.{event}", transfer, change.cause)
        if state is HandoffState.FILLING and change.previous is HandoffState.RESERVED:
            self._record("transfer.first_frame_received", transfer)
        if state is HandoffState.CLAIMED:
            self._claimed.append(transfer)
        if state.is_final:
            link = self._link_of.pop(transfer.transfer_id, None)
            if link is not None and state is HandoffState.ABORTED:
                self._replies.abort(link, bytes.fromhex(transfer.transfer_id), transfer.attempt, change.cause)
        self._on_state(change)

    def _record(self, event: str, transfer: IncomingTransfer, cause: str = "") -> None:
        self._ledger.record(
            event,
            request_id=transfer.request_id,
            transfer_id=transfer.transfer_id,
            attempt=transfer.attempt,
            cause=cause,
            bytes=transfer.num_bytes,
        )
