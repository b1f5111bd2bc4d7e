"""The sending side of transfers: which frame goes next on which link, and what answers and silence mean."""

from collections.abc import Callable, Iterable, Sequence
from math import inf

from isthmus.ledger import Ledger
from isthmus.types import Extent, TransferTarget
from kv_transfer.counters import Counters
from kv_transfer.frame_bodies import FrameBodies
from kv_transfer.frames import BadFrame, FrameHeader, FrameKind, FrameName
from kv_transfer.link import InFlight, Link, first_frame
from kv_transfer.messages import Abort, Acks, decode_credit
from kv_transfer.outgoing import AbortTransfer, AddRows, Command, CommitTransfer, OpenTransfer
from kv_transfer.outgoing_state import OutgoingState
from kv_transfer.pool_memory import RowMemory
from kv_transfer.sender_options import SenderOptions
from kv_transfer.wire import LinkLost, OpenWire, Wire

_MAX_BURST = 8  # frames sent on each link before answers and commands get their turn


class SenderCore:
    """Takes commands, answers and news of lost wires, each with the time; sends through the wires that it opens.

    One caller: the driver, from one thread. Every transfer's on_done is called exactly once, from within a call of
    this class, at the latest in `wires_closed`.
    """

    def __init__(
        self, incarnation: bytes, memory: RowMemory, ledger: Ledger, open_wire: OpenWire, options: SenderOptions
    ):
        self.counters = Counters()
        self._incarnation = incarnation
        self._memory = memory
        self._layout = memory.layout
        self._ledger = ledger
        self._open_wire = open_wire
        self._options = options
        self._bodies = FrameBodies(memory, options.staging_bytes)
        self._links: dict[tuple[str, str], Link] = {}  # (receiver incarnation, endpoint)
        self._by_wire: dict[Wire, Link] = {}
        self._transfers: dict[int, OutgoingState] = {}  # those that have not ended
        self._link_of: dict[int, Link] = {}  # of every one of them

    def obey(self, command: Command, now: float) -> None:
        """What a handle asks for. A transfer that has ended is beyond commands."""
        if isinstance(command, OpenTransfer):
            self._open(command, now)
            return
        transfer = self._transfers.get(command.number)
        if transfer is None:
            return
        match command:
            case AddRows(rows=rows):
                transfer.add_rows(rows)
                self._link_of[command.number].queue(transfer)
            case CommitTransfer(tokens=tokens):
                if problem := transfer.add_commit(tokens, now):
                    self._abort(transfer, Abort(problem), now)
                else:
                    self._link_of[command.number].queue(transfer)
            case AbortTransfer(reason=reason, finished=finished):
                self._abort(transfer, Abort(reason, finished=finished), now)

    def answered(self, wire: Wire, parts: Sequence[bytes], now: float) -> None:
        """One message that came over a wire."""
        if link := self._by_wire.get(wire):
            self._guard(link, now, lambda: self._take_answer(link, parts, now))

    def lost(self, wire: Wire, cause: str, now: float) -> None:
        """The wire's connection is gone."""
        if link := self._by_wire.get(wire):
            self._drop(link, cause, now)

    def turn(self, now: float) -> float | None:
        """Sends a burst and looks at deadlines. When to call again if nothing comes before; None: not at all."""
        self._report_if_quiet(self._bodies.free_orphans())
        has_more = self._send_burst(now)
        self._check_deadlines(now)
        return now if has_more else self._next_deadline(now)

    def fail_all(self, cause: str, now: float) -> None:
        """Every wire is closed, every transfer fails."""
        for link in list(self._links.values()):
            self._drop(link, cause, now)

    def wires_closed(self) -> None:
        """After `fail_all`: no wire reads memory any more, and what still waited for that is reported."""
        self._report_if_quiet(self._bodies.free_orphans(all_closed=True))

    def _open(self, opened: OpenTransfer, now: float) -> None:
        transfer = OutgoingState(opened, self._layout)
        try:
            link = self._link_to(opened.target, now)
        except LinkLost as lost:
            self._finish(transfer, str(lost), now)
            return
        self._transfers[opened.number] = transfer
        self._link_of[opened.number] = link
        link.transfers[opened.number] = transfer

    def _link_to(self, target: TransferTarget, now: float) -> Link:
        """Raises LinkLost."""
        key = (target.receiver_incarnation, target.zmq_endpoint)
        if (known := self._links.get(key)) is not None:
            return known
        wire = self._open_wire(target.zmq_endpoint)
        link = Link(wire, self._incarnation, target, self._layout, now)
        try:
            link.ask_credit()
        except LinkLost:
            wire.close()
            raise
        self._links[key] = link
        self._by_wire[wire] = link
        return link

    def _abort(self, transfer: OutgoingState, abort: Abort, now: float) -> None:
        if transfer.has_ended:
            return
        link = self._link_of[transfer.opened.number]
        self._finish(transfer, abort.cause, now)
        self._guard(link, now, lambda: link.send_small(FrameKind.ABORT, abort.encode(), transfer.opened.target))

    def _guard(self, link: Link, now: float, step: Callable[[], object]) -> bool:
        """What the step returns; False if it showed that the link is over."""
        try:
            return bool(step())
        except LinkLost as lost:
            self._drop(link, str(lost), now)
        except BadFrame as bad:
            self._drop(link, f"bad answer: {bad}", now)
        return False

    def _send_burst(self, now: float) -> bool:
        """Frames on every link that has something to send and may, each link in turn; True if there is more."""
        for _ in range(_MAX_BURST):
            links = list(self._links.values())
            sent = [self._guard(link, now, lambda link=link: self._send_next(link, now)) for link in links]
            if not any(sent):
                return False
        return True

    def _send_next(self, link: Link, now: float) -> bool:
        """One frame of the transfer whose turn it is. False: nothing to send, or no credit, or no staging."""
        while link.ready and not link.ready[0].has_work:
            link.ready.popleft()
        if not link.ready:
            return False
        transfer = link.ready[0]
        sent = self._send_piece(link, transfer, now) if transfer.pieces else self._send_commit(link, transfer, now)
        if sent:
            link.ready.rotate(-1)
        return sent

    def _send_piece(self, link: Link, transfer: OutgoingState, now: float) -> bool:
        """As many rows of the first piece as a frame holds."""
        piece = transfer.pieces[0]
        row_bytes = self._memory.row_bytes(piece.plane)
        if row_bytes > link.max_body_bytes and self._layout.plane(piece.plane).advisory:
            transfer.pieces.popleft()  # the receiver's rows of this plane are others: it would not keep them anyway
            return True
        rows = first_frame(piece, row_bytes, min(link.max_body_bytes, self._options.max_frame_bytes))
        if rows.num_tokens * row_bytes > link.credit_bytes:
            link.await_since(now)
            return False
        if not self._send_rows(link, transfer, rows):
            return False
        link.await_since(now)
        transfer.take_piece(rows.num_tokens)
        return True

    def _send_rows(self, link: Link, transfer: OutgoingState, rows: Extent) -> bool:
        """False: no memory to send them from."""
        body = self._bodies.take(transfer, rows)
        if body is None:
            return False
        try:
            name, reading = link.send_rows(transfer.opened.target, rows, body.bytes)
        except Exception:
            self._bodies.give_back(body)
            raise
        if transfer.note_sent(rows.plane):
            self._record("transfer.first_frame_sent", transfer)
        link.in_flight[name] = InFlight(transfer, rows.plane, len(body.bytes), body.slot, reading)
        transfer.num_borrowed += body.slot is None
        return True

    def _send_commit(self, link: Link, transfer: OutgoingState, now: float) -> bool:
        assert transfer.commit is not None, "has_work without pieces means a commit"
        link.send_small(FrameKind.COMMIT, transfer.commit, transfer.opened.target)
        transfer.note_commit_sent(now)
        return True

    def _take_answer(self, link: Link, parts: Sequence[bytes], now: float) -> None:
        """Raises LinkLost or BadFrame for what our receiver would not send."""
        header, body = link.verified(parts)
        if header.kind is FrameKind.CREDIT:
            link.take_credit(decode_credit(body))
        elif header.kind is FrameKind.ACK:
            acks = Acks.decode(body)
            link.take_credit(acks.credit_bytes)
            for name in acks.names:
                self._acked(link, name, now)
        elif header.kind is FrameKind.ABORT:
            self._refused(link, header, Abort.decode(body), now)
        link.note_answer(now)

    def _acked(self, link: Link, name: FrameName, now: float) -> None:
        if frame := link.in_flight.pop(name, None):
            frame.transfer.note_acked(frame.plane, frame.num_bytes, now)
            self._let_go(frame)
        elif name.kind == FrameKind.COMMIT.value:
            transfer = link.find(name)
            if transfer is not None and transfer.num_in_flight == 0:
                self._finish(transfer, "", now)

    def _refused(self, link: Link, header: FrameHeader, abort: Abort, now: float) -> None:
        """A frame was refused, which fails its transfer; or the receiver ended the transfer."""
        if abort.refused is FrameKind.CREDIT:
            raise LinkLost(f"refused: {abort.cause}")
        kind = 0 if abort.refused is None else abort.refused.value
        name = header.name._replace(kind=kind)
        if frame := link.in_flight.pop(name, None):
            frame.transfer.note_refused(frame.plane)
            self._let_go(frame)
            if self._layout.plane(frame.plane).advisory:  # the transfer does not depend on it
                self.counters.add(f"refused_by_peer.{abort.cause}")
                return
        if transfer := link.find(name):
            self.counters.add(f"refused_by_peer.{abort.cause}" if abort.refused else "aborted_by_peer")
            self._finish(transfer, f"refused: {abort.cause}" if abort.refused else f"aborted: {abort.cause}", now)

    def _check_deadlines(self, now: float) -> None:
        options = self._options
        for link in list(self._links.values()):
            given_up_at, cause = link.given_up(options)
            if now >= given_up_at:
                self._drop(link, cause, now)
        for transfer in list(self._transfers.values()):
            if now >= transfer.commit_due(options.ack_timeout_s):
                self._abort(transfer, Abort("the commit was not acknowledged"), now)

    def _next_deadline(self, now: float) -> float | None:
        options = self._options
        due = [link.given_up(options)[0] for link in self._links.values()]
        due += [transfer.commit_due(options.ack_timeout_s) for transfer in self._transfers.values()]
        due.append(self._bodies.next_look(now))
        first = min(due, default=inf)
        return None if first == inf else first

    def _drop(self, link: Link, cause: str, now: float) -> None:
        """The link is over: its transfers fail, and memory that its wire may still read waits for that."""
        self._links = {key: other for key, other in self._links.items() if other is not link}
        del self._by_wire[link.wire]
        link.wire.close()
        self._bodies.orphan(link.in_flight.values())
        for transfer in list(link.transfers.values()):
            self._finish(transfer, cause, now)

    def _let_go(self, frame: InFlight) -> None:
        self._bodies.let_go(frame)
        self._report_if_quiet([frame.transfer])

    def _finish(self, transfer: OutgoingState, failure: str, now: float) -> None:
        """The transfer has ended; its blocks stay borrowed while a wire reads them."""
        transfer.end(failure)
        self._transfers.pop(transfer.opened.number, None)
        if link := self._link_of.pop(transfer.opened.number, None):
            del link.transfers[transfer.opened.number]
            link.used_at = now
        self.counters.add("failed" if failure else "acked")
        self._record("transfer.failed" if failure else "transfer.acked", transfer, failure)
        self._report_if_quiet([transfer])

    def _report_if_quiet(self, transfers: Iterable[OutgoingState]) -> None:
        for transfer in transfers:
            if transfer.has_ended and not transfer.num_borrowed and not transfer.is_reported:
                transfer.is_reported = True
                try:
                    transfer.opened.on_done(transfer.outcome)
                except Exception as error:  # noqa: BLE001 - a handler's fault must not end the other transfers
                    self._record("transfer.error", transfer, repr(error))

    def _record(self, event: str, transfer: OutgoingState, cause: str = "") -> None:
        target = transfer.opened.target
        self._ledger.record(
            event,
            request_id=transfer.opened.request_id,
            transfer_id=target.transfer_id,
            attempt=target.attempt,
            cause=cause,
        )
