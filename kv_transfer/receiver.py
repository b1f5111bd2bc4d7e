"""The thread and the ROUTER socket of the decode side: they bring messages to the core and carry out what it says.

Other threads reserve, rearm, cancel and release. The lock guards the core. Rows are written outside it, while
`_writing` names the transfer, and whoever takes a transfer's blocks away waits until that is over.
"""

import math
import threading
from contextlib import suppress

import zmq

from isthmus.clock import Clock
from isthmus.ledger import Ledger
from isthmus.types import Extent
from kv_transfer.allocator import keep_freed_memory
from kv_transfer.frames import MAX_BODY_BYTES, Buffer, is_intact
from kv_transfer.pool_memory import RowMemory
from kv_transfer.receiver_core import ReceiverCore, Write
from kv_transfer.receiver_events import (
    DEFAULT_OPTIONS,
    ClaimedTransfer,
    FailedTransfer,
    ReceiverOptions,
    TransferEvents,
)
from kv_transfer.replies import Reply
from kv_transfer.sockets import bind_router
from kv_transfer.transfers import Reservation
from kv_transfer.waker import Waker

_MAX_WAIT_S = 0.1  # a deadline that another thread sets is seen this late
_MAX_BURST = 32  # messages taken before acks and deadlines get their turn


class Receiver:
    """Carries `receiver_core.ReceiverCore`: binds in the constructor (raises CannotStart), takes messages from `start`.

    `close` ends the thread and the socket.
    """

    def __init__(
        self,
        incarnation: str,
        memory: RowMemory,
        ledger: Ledger,
        events: TransferEvents,
        clock: Clock,
        options: ReceiverOptions = DEFAULT_OPTIONS,
    ):
        self._memory = memory
        self._events = events
        self._clock = clock
        keep_freed_memory(MAX_BODY_BYTES, 4 * options.credit_bytes)
        self._context, self._socket = bind_router(options.host, options.port)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._core = ReceiverCore(bytes.fromhex(incarnation), memory.layout, ledger, events.on_state, options)
        self.counters = self._core.counters
        self._lock = threading.Condition()  # guards the core and the next
        self._writing: str | None = None  # transfer whose rows are being copied
        self._waker = Waker()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-receiver", daemon=True)

    def start(self) -> "Receiver":
        """Once. Returns the receiver."""
        self._thread.start()
        return self

    def reserve(self, reservation: Reservation) -> None:
        """Rows of `reservation.missing` may now be written. Any thread. Raises as IncomingTransfers.reserve."""
        self._memory.check_table(reservation.block_table)
        with self._lock:
            self._core.reserve(reservation)

    def rearm(self, transfer_id: str, attempt: int, deadline: float) -> tuple[Extent, ...]:
        """Raises the transfer's attempt number and returns the ranges a new sender must bring. Any thread.

        Frames with a lower number are refused from then on. Raises StaleOwner.
        """
        with self._lock:
            self._wait_until_written(transfer_id)
            return self._core.rearm(transfer_id, attempt, deadline)

    def cancel(self, transfer_id: str, cause: str) -> bool:
        """After it returns no byte of the transfer's blocks is written any more. Any thread; calls only on_state.

        True if the transfer was open, claimed or not; an id not seen yet is refused when it comes.
        """
        with self._lock:
            was_open = self._core.cancel(transfer_id, cause, self._clock.now())
            self._wait_until_written(transfer_id)
        self._waker.wake()
        return was_open

    def release(self, transfer_id: str) -> bool:
        """The claimed transfer's request ended. Any thread. False if it was not claimed."""
        with self._lock:
            return self._core.release(transfer_id, self._clock.now())

    def restate(self) -> None:
        """Every open transfer goes to on_state as it is now, as a change from None. Any thread."""
        with self._lock:
            self._core.restate()

    def close(self) -> None:
        """Open transfers end without a call; returns when the thread is gone."""
        if self._is_closing:
            return
        self._is_closing = True
        self._waker.wake()
        if self._thread.is_alive():
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
        wait_s = 0.0
        while not self._is_closing:
            if self._waker.fd in dict(poller.poll(math.ceil(wait_s * 1000))):
                self._waker.clear()
            self._receive_burst()
            now = self._clock.now()
            with self._lock:
                call_at = self._core.tick(now)
            self._carry_out()
            wait_s = _MAX_WAIT_S if call_at is None else min(max(call_at - now, 0.0), _MAX_WAIT_S)

    def _receive_burst(self) -> None:
        with suppress(zmq.Again):
            for _ in range(_MAX_BURST):
                self._receive(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))

    def _receive(self, frames: list[zmq.Frame]) -> None:
        link = frames[0].bytes
        parts: list[Buffer] = [frame.buffer for frame in frames[1:]]
        try:
            with self._lock:
                write = self._core.received(link, parts, self._clock.now())
                self._writing = None if write is None else write.transfer_id
            if write is not None:
                self._write(write, *parts)
        except Exception as error:  # noqa: BLE001 - one message must not end the thread that serves all others
            with self._lock:
                self._core.failed(link, parts, repr(error))
        self._carry_out()

    def _write(self, write: Write, raw_header: Buffer, body: Buffer) -> None:
        try:
            intact = is_intact(raw_header, body)
            if intact:
                copy_rows(self._memory, write, memoryview(body))
            with self._lock:
                self._core.written(write, intact=intact)
        finally:
            with self._lock:
                self._writing = None
                self._lock.notify_all()

    def _carry_out(self) -> None:
        """Only this thread takes from the outbox."""
        while self._core.outbox:
            match self._core.outbox.popleft():
                case Reply() as reply:
                    self._send(reply)
                case ClaimedTransfer() as claimed:
                    self._events.on_ready(claimed)
                case FailedTransfer() as failed:
                    self._events.on_failed(failed)

    def _send(self, reply: Reply) -> None:
        """Never blocks: an answer to a link that is gone or does not read is dropped."""
        try:
            self._socket.send_multipart([reply.link, reply.header, reply.body], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # ROUTER_MANDATORY: a link whose connection is gone shows too
            with self._lock:
                self._core.not_sent(reply.link, is_lost=not isinstance(error, zmq.Again))


def copy_rows(memory: RowMemory, write: Write, body: memoryview) -> None:
    """The rows of a verified frame into the gaps that it may fill."""
    place = write.accept.place
    table = write.accept.transfer.reservation.block_table
    row_bytes = memory.row_bytes(place[0])
    for first, end in write.accept.gaps:
        rows = body[(first - write.header.first_token) * row_bytes :]
        memory.write_rows(place, table, (first, end), rows)
