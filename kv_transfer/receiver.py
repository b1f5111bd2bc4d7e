"""The decode side of transfers: one thread, one ROUTER socket, rows verified and then written into the pool.

Other threads reserve, rearm, cancel and release. The lock guards the state machine; rows are written outside it, while
`_writing` names the transfer, and whoever takes a transfer's blocks away waits until that is over.
"""

import threading
from collections import deque
from contextlib import suppress

import zmq

from isthmus.ledger import Ledger
from isthmus.types import Extent
from kv_transfer.allocator import keep_freed_memory
from kv_transfer.counters import Counters
from kv_transfer.events import DEFAULT_OPTIONS, ClaimedTransfer, FailedTransfer, ReceiverOptions, TransferEvents
from kv_transfer.frames import MAX_BODY_BYTES, BadFrame, FrameHeader, FrameKind, FrameName, Refusal, is_intact
from kv_transfer.messages import Abort, Commit, decode_credit
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.pool_memory import RowMemory
from kv_transfer.replies import Replies
from kv_transfer.sockets import bind_router
from kv_transfer.transfers import Accept, IncomingTransfer, IncomingTransfers, Reservation, StateChange
from kv_transfer.waker import Waker

_TICK_MS = 100  # resolution of fill deadlines
_MAX_BURST = 32  # messages taken before notices and deadlines get their turn


class Receiver:
    """Binds and starts in the constructor (raises CannotStart); `close` ends the thread and the socket."""

    def __init__(
        self,
        incarnation: str,
        memory: RowMemory,
        ledger: Ledger,
        events: TransferEvents,
        options: ReceiverOptions = DEFAULT_OPTIONS,
    ):
        self._incarnation = bytes.fromhex(incarnation)
        self._memory = memory
        self._fingerprint = bytes.fromhex(memory.layout.fingerprint)
        self._ledger = ledger
        self._events = events
        self.counters = Counters()
        self._lock = threading.Condition()
        self._writing: str | None = None
        self._links: dict[str, bytes] = {}  # open transfer -> routing id that last brought a verified frame
        self._claimed: deque[IncomingTransfer] = deque()
        # (link to be told, transfer that ended here, why); at most one per transfer
        self._notices: deque[tuple[bytes, IncomingTransfer, str]] = deque()
        self._transfers = IncomingTransfers(
            memory.layout, options.clock, on_change=self._note_change, max_transfers=options.max_transfers
        )
        keep_freed_memory(MAX_BODY_BYTES, 4 * options.credit_bytes)
        self._context, self._socket = bind_router(options.host, options.port)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        widest = max(plane.row_bytes for plane in memory.layout.planes)
        window_bytes, ends = max(options.credit_bytes, 4 * widest), (self._incarnation, self._fingerprint)
        self._replies = Replies(self._socket, *ends, self.counters, window_bytes, options.max_peers)
        self._waker = Waker()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kv-receiver", daemon=True)
        self._thread.start()

    def reserve(self, reservation: Reservation) -> None:
        """Rows of `reservation.missing` may now be written. Any thread. Raises as IncomingTransfers.reserve."""
        self._memory.check_table(reservation.block_table)
        with self._lock:
            self._transfers.reserve(reservation)

    def rearm(self, transfer_id: str, attempt: int, deadline: float) -> tuple[Extent, ...]:
        """Refuses the writers so far and returns the ranges a new one must bring. Any thread. Raises StaleOwner."""
        with self._lock:
            self._wait_until_written(transfer_id)
            return self._transfers.rearm(transfer_id, attempt, deadline)

    def cancel(self, transfer_id: str, cause: str) -> bool:
        """After it returns no byte of the transfer's blocks is written any more. Any thread; calls only on_state.

        True if the transfer was open, claimed or not; an id not seen yet is refused when it comes.
        """
        with self._lock:
            ended = self._transfers.release(transfer_id) or self._transfers.abort(transfer_id, cause)
            self._wait_until_written(transfer_id)
        self._waker.wake()
        return ended is not None

    def release(self, transfer_id: str) -> bool:
        """The claimed transfer's request ended. Any thread. False if it was not claimed."""
        with self._lock:
            return self._transfers.release(transfer_id) is not None

    def restate(self) -> None:
        """Every open transfer goes to on_state as it is now, as a change from None. Any thread."""
        with self._lock:
            for transfer in self._transfers:
                self._events.on_state(StateChange(transfer, None))

    def close(self) -> None:
        """Open transfers end without a call; returns when the thread is gone."""
        if self._stopping:
            return
        self._stopping = True
        self._waker.wake()
        self._thread.join()
        self._socket.close()
        self._context.term()
        self._waker.close()

    def _wait_until_written(self, transfer_id: str) -> None:
        if threading.current_thread() is not self._thread:  # a handler runs between writes
            self._lock.wait_for(lambda: self._writing != transfer_id)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.fd, zmq.POLLIN)
        while not self._stopping:
            if self._waker.fd in dict(poller.poll(_TICK_MS)):
                self._waker.clear()
            self._receive_burst()
            self._expire()
            self._send_notices()
            self._replies.flush()

    def _receive_burst(self) -> None:
        with suppress(zmq.Again):
            for _ in range(_MAX_BURST):
                self._receive(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))

    def _receive(self, parts: list[zmq.Frame]) -> None:
        """One message, checked in full before memory is touched. A refusal changes nothing but a counter."""
        try:
            if len(parts) != 3:  # routing id, header, body
                raise BadFrame(Refusal.MALFORMED)
            header = FrameHeader.decode(parts[1].buffer)
        except BadFrame as bad:  # nothing in it can be believed, not even which transfer to answer about
            self.counters.add(f"refused.{bad.refusal.value}")
            return
        link, body = parts[0].bytes, parts[2].buffer
        try:
            self._check_link(link, header, len(body))
            self._act(link, header, parts[1].bytes, body)
        except BadFrame as bad:
            self._replies.refuse(link, header, bad.refusal)
        except Exception as error:  # noqa: BLE001 - one message must not end the thread that serves all others
            self._ledger.record("transfer.error", transfer_id=header.transfer_id, cause=repr(error))
            self._replies.refuse(link, header, Refusal.INTERNAL)
        self._report_claims()

    def _check_link(self, link: bytes, header: FrameHeader, body_bytes: int) -> None:
        if header.kind is not FrameKind.CREDIT:
            self._replies.spend(link, header.sender, body_bytes if header.kind is FrameKind.FILL else 0)
        if header.fingerprint != self._fingerprint:
            raise BadFrame(Refusal.LAYOUT_MISMATCH)
        if header.receiver != self._incarnation:
            raise BadFrame(Refusal.STALE_OWNER)
        if header.body_bytes != body_bytes:
            raise BadFrame(Refusal.BAD_BODY)

    def _act(self, link: bytes, header: FrameHeader, raw_header: bytes, body: memoryview) -> None:
        if header.kind is FrameKind.FILL:
            self._fill(link, header, raw_header, body)
            return
        if not is_intact(raw_header, body):
            raise BadFrame(Refusal.BAD_CHECKSUM)
        if header.kind is FrameKind.COMMIT:
            self._commit(link, header, body)
        elif header.kind is FrameKind.ABORT:
            self._abort(link, header, body)
        elif header.kind is FrameKind.CREDIT and decode_credit(body) == 0:
            self._replies.admit(link, header)
        else:
            raise BadFrame(Refusal.BAD_KIND)

    def _fill(self, link: bytes, header: FrameHeader, raw_header: bytes, body: memoryview) -> None:
        with self._lock:
            accept = self._transfers.check(header)
            was_covered = accept.transfer.is_covered
            self._writing = header.transfer_id
        try:
            if not is_intact(raw_header, body):
                raise BadFrame(Refusal.BAD_CHECKSUM)
            self._write_gaps(accept, header, body)
            with self._lock:
                self._transfers.filled(header)
                self._links[header.transfer_id] = link
        finally:
            with self._lock:
                self._writing = None
                self._lock.notify_all()
        self._replies.ack(link, header.name)
        if not was_covered and accept.transfer.is_covered:
            self._record("transfer.covered", accept.transfer)

    def _write_gaps(self, accept: Accept, header: FrameHeader, body: memoryview) -> None:
        place, table = accept.place, accept.transfer.reservation.block_table
        row_bytes = self._memory.row_bytes(place[0])
        for first, end in accept.gaps:
            self._memory.write_rows(place, table, (first, end), body[(first - header.first_token) * row_bytes :])

    def _commit(self, link: bytes, header: FrameHeader, body: memoryview) -> None:
        commit = Commit.decode(body, self._memory.layout)
        with self._lock:
            was_claimed = (known := self._transfers.find(header.transfer_id)) and known.state is HandoffState.CLAIMED
            self._transfers.committed(header, commit)
            self._links[header.transfer_id] = link
        if was_claimed:  # otherwise acknowledged when the rows are there
            self._replies.ack(link, header.name)

    def _abort(self, link: bytes, header: FrameHeader, body: memoryview) -> None:
        """A sender that fails leaves the reservation to another; one whose request has finished ends it."""
        notice, failure = Abort.decode(body), None
        with self._lock:
            self._transfers.check(header)
            self._links.pop(header.transfer_id, None)  # the sender knows
            if notice.finished:
                left = self._transfers.abort(header.transfer_id, notice.cause)
            elif left := self._transfers.abandon(header.transfer_id):
                self._record("transfer.abandoned", left, notice.cause)
            if left is not None:  # told as it was here: it may be rearmed at once
                failure = FailedTransfer.of(left, notice.cause, finished=notice.finished)
        self._replies.ack(link, header.name)
        if failure is not None:
            self._report_failure(failure)

    def _expire(self) -> None:
        with self._lock:
            failed = self._transfers.expire()
        for transfer in failed:
            self._report_failure(FailedTransfer.of(transfer, "fill_deadline"))

    def _send_notices(self) -> None:
        while self._notices:
            link, transfer, cause = self._notices.popleft()
            self._replies.abort(link, bytes.fromhex(transfer.transfer_id), transfer.attempt, cause)

    def _report_claims(self) -> None:
        while self._claimed:
            transfer = self._claimed.popleft()
            with self._lock:
                link = self._links.get(transfer.transfer_id)
            if link is not None:  # else released by another thread already
                transfer_bytes = bytes.fromhex(transfer.transfer_id)
                self._replies.ack(link, FrameName(FrameKind.COMMIT.value, transfer_bytes, transfer.attempt))
                assert transfer.commit is not None, "claimed by its commit"
                ids = transfer.transfer_id, transfer.request_id
                self._events.on_ready(ClaimedTransfer(*ids, transfer.commit.tokens))

    def _report_failure(self, failure: FailedTransfer) -> None:
        self.counters.add("finished" if failure.finished else "failed")
        self._events.on_failed(failure)

    def _note_change(self, change: StateChange) -> None:
        """Under the lock, from whichever thread made the change."""
        transfer, state = change.transfer, change.transfer.state
        event = change.cause if change.previous is state else state.value.lower()
        self._record(f"handoff.{event}", transfer, change.cause)
        if state is HandoffState.FILLING and change.previous is HandoffState.RESERVED:
            self._record("transfer.first_frame_received", transfer)
        if state is HandoffState.CLAIMED:
            self._claimed.append(transfer)
        if state.is_final:
            link = self._links.pop(transfer.transfer_id, None)
            if link is not None and state is HandoffState.ABORTED:
                self._notices.append((link, transfer, change.cause))
        self._events.on_state(change)

    def _record(self, event: str, transfer: IncomingTransfer, cause: str = "") -> None:
        self._ledger.record(
            event,
            request_id=transfer.request_id,
            transfer_id=transfer.transfer_id,
            attempt=transfer.attempt,
            cause=cause,
            bytes=transfer.num_bytes,
        )
