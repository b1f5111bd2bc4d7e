"""The sending side of transfers: one thread owns every link, takes rows from the pool, seals and sends them.

A transfer's blocks are read until its on_done and not after; that comes exactly once, from this thread.
"""

import threading
from collections import deque
from collections.abc import Sequence

from isthmus.errors import LayoutMismatch, Overloaded
from isthmus.ledger import Ledger
from isthmus.types import TransferTarget
from kv_transfer.courier import Courier, SenderOptions
from kv_transfer.outgoing import Command, OnDone, OutgoingState, OutgoingTransfer, TransferOutcome
from kv_transfer.pool_memory import RowMemory

_TICK_MS = 100  # resolution of deadlines


class Sender:
    """Starts its thread in the constructor; `close` fails what is open and ends it."""

    def __init__(self, incarnation: str, memory: RowMemory, ledger: Ledger, *, options: SenderOptions | None = None):
        self._memory = memory
        self._ledger = ledger
        options = options or SenderOptions()
        self._max_transfers = options.max_transfers
        self._courier = Courier(bytes.fromhex(incarnation), memory, ledger, options)
        self.counters = self._courier.counters
        self._commands: deque[Command] = deque()  # bounded by max_transfers and the pieces of a transfer
        self._lock = threading.Lock()
        self._num_open = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnDone, *, request_id: str = ""
    ) -> OutgoingTransfer:
        """on_done follows exactly once, from the sender's thread. Any thread.

        Raises LayoutMismatch, Overloaded, or ValueError for a malformed target; then on_done is not called.
        """
        layout = self._memory.layout
        if target.layout_fingerprint != layout.fingerprint:
            raise LayoutMismatch(f"target layout {target.layout_fingerprint[:32]}, this worker {layout.fingerprint}")
        if any(len(bytes.fromhex(name)) != 16 for name in (target.transfer_id, target.receiver_incarnation)):
            raise ValueError("transfer id and receiver incarnation are 32 hex digits")
        self._memory.check_table(block_table)
        if unknown := {extent.plane for extent in target.missing} - {plane.name for plane in layout.planes}:
            raise ValueError(f"the layout has no plane {sorted(unknown)}")

        def done(outcome: TransferOutcome) -> None:
            with self._lock:
                self._num_open -= 1
            on_done(outcome)

        state = OutgoingState(target.missing, layout)
        transfer = OutgoingTransfer(target, tuple(block_table), done, request_id, state, self._post)
        with self._lock:
            if self._stopping or self._num_open >= self._max_transfers:
                raise Overloaded("no more transfers can be opened", retry_after_s=1.0)
            self._num_open += 1
            self._commands.append(lambda courier: courier.open(transfer))
        self._courier.waker.wake()
        return transfer

    def close(self) -> None:
        """Open transfers fail with `sender_closed`; returns when the thread is gone."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._courier.waker.wake()
        self._thread.join()
        self._courier.waker.close()

    def _post(self, command: Command) -> None:
        self._commands.append(command)
        self._courier.waker.wake()

    def _run(self) -> None:
        courier, more = self._courier, False
        while not self._stopping:
            speaking = courier.wait(0 if more else _TICK_MS)
            try:
                self._handle_commands()
                more = courier.turn(speaking)
                courier.check_deadlines()
            except Exception as error:  # noqa: BLE001 - the thread's root: what is open fails, what comes is served
                self._ledger.record("transfer.error", cause=repr(error))
                courier.fail_all(f"internal error ({type(error).__name__})")
        self._handle_commands()  # what was opened before the stop still gets its on_done
        courier.close()

    def _handle_commands(self) -> None:
        while self._commands:
            self._commands.popleft()(self._courier)
