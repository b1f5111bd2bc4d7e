"""The thread of the sending side: it waits for commands and answers, and lets the core say what to send.

A transfer's blocks are read until its on_done and not after; that comes exactly once, from this thread.
"""

import itertools
import threading
from collections import deque
from collections.abc import Sequence

from isthmus.clock import Clock
from isthmus.errors import Overloaded
from isthmus.ledger import Ledger
from isthmus.types import TransferTarget
from kv_transfer.dealer_wire import DealerWires, SpeakingWire
from kv_transfer.outgoing import Command, OnDone, OpenTransfer, OutgoingTransfer, TransferOutcome, check_target
from kv_transfer.pool_memory import RowMemory
from kv_transfer.sender_core import SenderCore
from kv_transfer.sender_options import SenderOptions


class Sender:
    """Carries `sender_core.SenderCore`, which only its thread calls. `start` begins; `close` fails what is open."""

    def __init__(
        self,
        incarnation: str,
        memory: RowMemory,
        ledger: Ledger,
        clock: Clock,
        *,
        options: SenderOptions | None = None,
    ):
        options = options or SenderOptions()
        self._memory = memory
        self._ledger = ledger
        self._clock = clock
        self._max_transfers = options.max_transfers
        self._wires = DealerWires(options.failpoints)
        self._core = SenderCore(bytes.fromhex(incarnation), memory, ledger, self._wires.open, options)
        self.counters = self._core.counters
        self._commands: deque[Command] = deque()  # bounded by max_transfers and the pieces of a transfer
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards the next two
        self._num_open = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)

    def start(self) -> "Sender":
        """Once. Returns the sender."""
        self._thread.start()
        return self

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnDone, *, request_id: str = ""
    ) -> OutgoingTransfer:
        """on_done follows exactly once, from the sender's thread. Any thread.

        Raises LayoutMismatch, Overloaded, or ValueError for a malformed target; then on_done is not called.
        """
        check_target(target, self._memory.layout)
        self._memory.check_table(block_table)

        def done(outcome: TransferOutcome) -> None:
            with self._lock:
                self._num_open -= 1
            on_done(outcome)

        with self._lock:
            if self._is_closing or self._num_open >= self._max_transfers:
                raise Overloaded("no more transfers can be opened", retry_after_s=1.0)
            self._num_open += 1
            number = next(self._numbers)
            self._commands.append(OpenTransfer(number, target, tuple(block_table), request_id, done))
        self._wires.wake()
        return OutgoingTransfer(number, self._post)

    def close(self) -> None:
        """Open transfers fail with `sender_closed`; returns when the thread is gone."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        self._wires.wake()
        if self._thread.is_alive():
            self._thread.join()
        else:
            self._end()
        self._wires.forget_waker()

    def _post(self, command: Command) -> None:
        self._commands.append(command)
        self._wires.wake()

    def _run(self) -> None:
        call_at: float | None = None
        while not self._is_closing:
            speaking = self._wires.wait(None if call_at is None else call_at - self._clock.now())
            try:
                call_at = self._turn(speaking)
            except Exception as error:  # noqa: BLE001 - the thread's root: what is open fails, what comes is served
                self._ledger.record("transfer.error", cause=repr(error))
                call_at = self._clock.now()
                self._core.fail_all(f"internal error ({type(error).__name__})", call_at)
        self._end()

    def _turn(self, speaking: list[SpeakingWire]) -> float | None:
        self._obey_commands()
        for wire in speaking:
            while (parts := wire.receive()) is not None:
                self._core.answered(wire, parts, self._clock.now())
            if cause := wire.loss():
                self._core.lost(wire, cause, self._clock.now())
        return self._core.turn(self._clock.now())

    def _obey_commands(self) -> None:
        while self._commands:
            self._core.obey(self._commands.popleft(), self._clock.now())

    def _end(self) -> None:
        """What was opened before the end still gets its on_done."""
        self._obey_commands()
        self._core.fail_all("sender_closed", self._clock.now())
        self._wires.close()
        self._core.wires_closed()
