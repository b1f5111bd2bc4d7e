"""The work of the sender's thread: rows into frames, frames onto links in turn, answers back to transfers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import zmq

from isthmus.clock import SystemClock
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.types import Extent, Token
from kv_transfer.counters import Counters
from kv_transfer.frames import BadFrame, FrameHeader, FrameKind, FrameName
from kv_transfer.link import InFlight, Link, LinkLost
from kv_transfer.messages import Abort, Acks
from kv_transfer.outgoing import OutgoingTransfer
from kv_transfer.pool_memory import RowMemory
from kv_transfer.sockets import Context
from kv_transfer.staging import Staging
from kv_transfer.waker import Waker

_ORPHAN_MS = 5  # how often memory that a closed link still reads is looked at
_MAX_BURST = 8  # frames sent before answers and commands get their turn


@dataclass(frozen=True, slots=True)
class SenderOptions:
    staging_bytes: int = 64 * 2**20
    max_frame_bytes: int = 4 * 2**20
    ack_timeout_s: float = 5.0  # without any answer
    idle_link_s: float = 60.0
    max_transfers: int = 1024
    failpoints: Failpoints = field(default_factory=Failpoints)


class Courier:
    """Used by one thread, woken by any. Calls every transfer's on_done exactly once, at the latest in `close`."""

    def __init__(self, incarnation: bytes, memory: RowMemory, ledger: Ledger, options: SenderOptions):
        self._incarnation = incarnation
        self._memory = memory
        self._layout = memory.layout
        self._ledger = ledger
        self._now = SystemClock().now
        self._options = options
        self.counters = Counters()
        self.waker = Waker()  # ends `wait`
        self._context: Context = zmq.Context(io_threads=1)
        self._poller = zmq.Poller()
        self._poller.register(self.waker.fd, zmq.POLLIN)
        self._staging = Staging(self._options.staging_bytes)
        self._links: dict[tuple[str, str], Link] = {}  # (receiver incarnation, endpoint)
        self._link_of: dict[OutgoingTransfer, Link] = {}
        self._orphans: list[InFlight] = []  # of closed links: ZeroMQ may still be reading their staging

    def wait(self, timeout_ms: int) -> set[object]:
        """Sockets and monitors that have something to say; a wake-up ends the wait too."""
        timeout_ms = min(timeout_ms, _ORPHAN_MS) if self._orphans else timeout_ms
        speaking = {who for who, _ in self._poller.poll(timeout_ms)}
        if self.waker.fd in speaking:
            self.waker.clear()
        return speaking

    def open(self, transfer: OutgoingTransfer) -> None:
        target = transfer.target
        key = (target.receiver_incarnation, target.zmq_endpoint)
        if (link := self._links.get(key)) is None:
            try:
                link = Link(self._context, self._incarnation, self._layout, target, self._options.failpoints)
            except LinkLost as lost:
                self._finish(transfer, str(lost))
                return
            self._links[key] = link
            self._poller.register(link.socket, zmq.POLLIN)
            self._poller.register(link.monitor, zmq.POLLIN)
        link.transfers.add(transfer)
        self._link_of[transfer] = link

    def add_rows(self, transfer: OutgoingTransfer, rows: Extent) -> None:
        if not transfer.state.has_ended:
            transfer.state.add_rows(rows)
            self._queue(transfer)

    def commit(self, transfer: OutgoingTransfer, tokens: tuple[Token, ...]) -> None:
        if transfer.state.has_ended:
            return
        transfer.state.progress_at = self._now()
        if problem := transfer.state.add_commit(tokens):
            self.abort(transfer, problem)
        else:
            self._queue(transfer)

    def abort(self, transfer: OutgoingTransfer, reason: str, *, finished: bool = False) -> None:
        if transfer.state.has_ended:
            return
        link = self._link_of[transfer]
        self._finish(transfer, reason)
        body = Abort(reason, finished=finished).encode()
        self._guard(link, lambda link: link.send_small(FrameKind.ABORT, body, transfer.target) or False)

    def turn(self, speaking: set[object]) -> bool:
        """Takes answers from those that `wait` named, then sends a burst. True if there is more to send at once."""
        for link in list(self._links.values()):
            if link.socket in speaking:
                self._guard(link, self._take_answers)
            if link.monitor in speaking:
                self._guard(link, Link.check_connection)
        self._free_orphans()
        for _ in range(_MAX_BURST):
            sent = [self._guard(link, self._send_next) for link in list(self._links.values())]
            if not any(sent):
                return False
        return True

    def check_deadlines(self) -> None:
        now, timeout_s = self._now(), self._options.ack_timeout_s
        for link in list(self._links.values()):
            if link.waiting_since is not None and now - link.waiting_since > timeout_s:
                self._drop(link, "no answer")
            elif not link.transfers and not link.in_flight and now - link.used_at > self._options.idle_link_s:
                self._drop(link, "idle")
        for transfer in list(self._link_of):
            state = transfer.state
            if state.commit_sent and not state.num_in_flight and now - state.progress_at > timeout_s:
                self.abort(transfer, "the commit was not acknowledged")

    def fail_all(self, cause: str) -> None:
        for link in list(self._links.values()):
            self._drop(link, cause)

    def close(self) -> None:
        self.fail_all("sender_closed")
        self._context.term()  # returns when ZeroMQ holds no message any more
        for frame in self._orphans:
            self._let_go(frame)

    def _guard(self, link: Link, step: Callable[[Link], bool]) -> bool:
        try:
            return step(link)
        except LinkLost as lost:
            self._drop(link, str(lost))
        except BadFrame as bad:
            self._drop(link, f"bad answer: {bad}")
        return False

    def _queue(self, transfer: OutgoingTransfer) -> None:
        ready = self._link_of[transfer].ready
        if transfer.state.has_work and transfer not in ready:
            ready.append(transfer)

    def _send_next(self, link: Link) -> bool:
        """One frame of the transfer whose turn it is. False: nothing to send, or no credit, or no staging."""
        while link.ready and not link.ready[0].state.has_work:
            link.ready.popleft()
        if not link.ready:
            return False
        transfer = link.ready[0]
        sent = self._send_piece(link, transfer) if transfer.state.pieces else self._send_commit(link, transfer)
        if sent:
            link.ready.rotate(-1)
        return sent

    def _send_piece(self, link: Link, transfer: OutgoingTransfer) -> bool:
        state = transfer.state
        piece = state.pieces[0]
        row_bytes = self._memory.row_bytes(piece.plane)
        if row_bytes > link.max_body_bytes and self._layout.plane(piece.plane).advisory:
            state.pieces.popleft()  # the receiver's rows of this plane are others: it would not keep them anyway
            return True
        max_rows = max(1, min(link.max_body_bytes, self._options.max_frame_bytes) // row_bytes)
        part = replace(piece, num_tokens=min(piece.num_tokens, max_rows))
        num_bytes = part.num_tokens * row_bytes
        if num_bytes > link.credit_bytes:
            link.await_since(self._now())
            return False
        interval = (part.first_token, part.end)
        table = transfer.block_table
        slot, body = None, self._memory.contiguous(piece.place, table, interval)
        if body is None:
            if (slot := self._staging.acquire(num_bytes)) is None:
                return False
            body = slot.view
            self._memory.read_rows(piece.place, table, interval, body)
        if state.note_sent(piece.plane):
            self._record("transfer.first_frame_sent", transfer)
        name, tracker = link.send_fill(transfer.target, part, body)
        link.in_flight[name] = InFlight(transfer, piece.plane, num_bytes, slot, tracker)
        state.num_borrowed += slot is None
        link.await_since(self._now())
        state.pieces.popleft()
        if part.end < piece.end:
            state.pieces.appendleft(replace(piece, first_token=part.end, num_tokens=piece.end - part.end))
        return True

    def _send_commit(self, link: Link, transfer: OutgoingTransfer) -> bool:
        assert transfer.state.commit is not None, "has_work without pieces means a commit"
        link.send_small(FrameKind.COMMIT, transfer.state.commit, transfer.target)
        transfer.state.commit_sent = True
        transfer.state.progress_at = self._now()
        return True

    def _take_answers(self, link: Link) -> bool:
        for header, body in link.answers():
            if header.kind is FrameKind.ACK:
                acks = Acks.decode(body)
                link.take_credit(acks.credit_bytes)
                for name in acks.names:
                    self._acked(link, name)
            elif header.kind is FrameKind.ABORT:
                self._refused(link, header, Abort.decode(body))
            link.progressed(self._now())
        return False

    def _acked(self, link: Link, name: FrameName) -> None:
        if frame := link.in_flight.pop(name, None):
            frame.transfer.state.note_acked(frame.plane, frame.num_bytes)
            frame.transfer.state.progress_at = self._now()
            self._let_go(frame)
        elif name.kind == FrameKind.COMMIT.value:
            transfer = self._find(link, name)
            if transfer is not None and transfer.state.num_in_flight == 0:
                self._finish(transfer, "")

    def _refused(self, link: Link, header: FrameHeader, abort: Abort) -> None:
        if abort.refused is FrameKind.CREDIT:
            raise LinkLost(f"refused: {abort.cause}")
        kind = 0 if abort.refused is None else abort.refused.value
        name = header.name._replace(kind=kind)
        if frame := link.in_flight.pop(name, None):
            is_advisory = self._layout.plane(frame.plane).advisory
            frame.transfer.state.num_in_flight -= not is_advisory
            self._let_go(frame)
            if is_advisory:  # the transfer does not depend on it
                self.counters.add(f"refused_by_peer.{abort.cause}")
                return
        if transfer := self._find(link, name):
            self.counters.add(f"refused_by_peer.{abort.cause}" if abort.refused else "aborted_by_peer")
            self._finish(transfer, f"refused: {abort.cause}" if abort.refused else f"aborted: {abort.cause}")

    def _find(self, link: Link, name: FrameName) -> OutgoingTransfer | None:
        place = (name.transfer.hex(), name.attempt)
        matching = (t for t in link.transfers if (t.target.transfer_id, t.target.attempt) == place)
        return next(matching, None)

    def _drop(self, link: Link, cause: str) -> None:
        """The link is over: its transfers fail, its staging waits for ZeroMQ to let go."""
        self._links = {key: other for key, other in self._links.items() if other is not link}
        self._poller.unregister(link.socket)
        self._poller.unregister(link.monitor)
        link.close()
        self._orphans.extend(link.in_flight.values())
        for transfer in list(link.transfers):
            self._finish(transfer, cause)

    def _free_orphans(self) -> None:
        done = [frame for frame in self._orphans if frame.tracker.done]
        self._orphans = [frame for frame in self._orphans if not frame.tracker.done]
        for frame in done:
            self._let_go(frame)

    def _let_go(self, frame: InFlight) -> None:
        """ZeroMQ reads the frame's memory no more."""
        if frame.slot is not None:
            self._staging.release(frame.slot)
            return
        frame.transfer.state.num_borrowed -= 1
        self._report_if_quiet(frame.transfer)

    def _finish(self, transfer: OutgoingTransfer, failure: str) -> None:
        """The transfer has ended; its blocks stay borrowed while ZeroMQ reads them."""
        state = transfer.state
        if state.has_ended:
            return
        state.end(failure)
        if link := self._link_of.pop(transfer, None):
            link.transfers.discard(transfer)
            link.used_at = self._now()
        self.counters.add("failed" if failure else "acked")
        self._record("transfer.failed" if failure else "transfer.acked", transfer, failure)
        self._report_if_quiet(transfer)

    def _report_if_quiet(self, transfer: OutgoingTransfer) -> None:
        state = transfer.state
        if not state.has_ended or state.num_borrowed or state.closed:
            return
        state.closed = True
        try:
            transfer.on_done(state.outcome)
        except Exception as error:  # noqa: BLE001 - a handler's fault must not end the other transfers
            self._record("transfer.error", transfer, repr(error))

    def _record(self, event: str, transfer: OutgoingTransfer, cause: str = "") -> None:
        target, request_id = transfer.target, transfer.request_id
        self._ledger.record(
            event, request_id=request_id, transfer_id=target.transfer_id, attempt=target.attempt, cause=cause
        )
