"""Sender and receiver without thread or socket: their cores over wires in memory, in virtual time.

They have the public names of `kv_transfer.sender.Sender` and `kv_transfer.receiver.Receiver`.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence

from isthmus.ledger import Ledger
from isthmus.testing.memory_wire import MemoryNetwork, MemoryWire, Parts, Timer
from isthmus.types import Extent, TransferTarget
from kv_transfer.frames import is_intact
from kv_transfer.outgoing import Command, OnDone, OpenTransfer, OutgoingTransfer, check_target
from kv_transfer.pool_memory import RowMemory
from kv_transfer.receiver import copy_rows
from kv_transfer.receiver_core import ReceiverCore
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions, TransferEvents
from kv_transfer.replies import Reply
from kv_transfer.sender_core import SenderCore
from kv_transfer.sender_options import SenderOptions
from kv_transfer.transfers import Reservation


class PlainTimer:
    """Virtual time: calls in the order of their moments, those of one moment in the order they were asked for."""

    def __init__(self, now: float = 100.0):
        self._now = now
        self._numbers = itertools.count()
        self._calls: list[tuple[float, int, Callable[[], object]]] = []
        self.num_calls = 0

    def time(self) -> float:
        return self._now

    def call_later(self, delay: float, callback: Callable[[], object]) -> None:
        assert delay >= 0
        heapq.heappush(self._calls, (self._now + delay, next(self._numbers), callback))

    def run(self, max_calls: int = 100_000) -> None:
        """Until nothing is left to be done."""
        while self._calls:
            self._now, _, callback = heapq.heappop(self._calls)
            callback()
            self.num_calls += 1
            assert self.num_calls < max_calls, "it does not come to rest"


class Turns:
    """Calls a turn at the moments it asks for, and once for all that comes at the same moment."""

    def __init__(self, timer: Timer, turn: Callable[[float], float | None]):
        self._timer = timer
        self._turn = turn
        self._due: float | None = None

    def soon(self) -> None:
        self._at(self._timer.time())

    def _at(self, moment: float) -> None:
        if self._due is None or moment < self._due:
            self._due = moment
            self._timer.call_later(max(moment - self._timer.time(), 0.0), lambda: self._run(moment))

    def _run(self, moment: float) -> None:
        if self._due == moment:  # else an earlier turn came, which has asked again if it wanted to
            self._due = None
            call_at = self._turn(self._timer.time())
            if call_at is not None:
                self._at(call_at)


class TimedSender:
    """A sender core and its wires."""

    def __init__(
        self,
        incarnation: str,
        memory: RowMemory,
        ledger: Ledger,
        network: MemoryNetwork,
        options: SenderOptions | None = None,
    ):
        self._memory = memory
        self._network = network
        self._commands: deque[Command] = deque()
        self._numbers = itertools.count()
        self._turns = Turns(network.timer, self._turn)
        self.core = SenderCore(bytes.fromhex(incarnation), memory, ledger, self._open_wire, options or SenderOptions())
        self.counters = self.core.counters

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnDone, *, request_id: str = ""
    ) -> OutgoingTransfer:
        check_target(target, self._memory.layout)
        self._memory.check_table(block_table)
        number = next(self._numbers)
        self._post(OpenTransfer(number, target, tuple(block_table), request_id, on_done))
        return OutgoingTransfer(number, self._post)

    def close(self) -> None:
        self._obey_commands()
        self.core.fail_all("sender_closed", self._network.timer.time())
        self.core.wires_closed()

    def _post(self, command: Command) -> None:
        self._commands.append(command)
        self._turns.soon()

    def _turn(self, now: float) -> float | None:
        self._obey_commands()
        return self.core.turn(now)

    def _obey_commands(self) -> None:
        while self._commands:
            self.core.obey(self._commands.popleft(), self._network.timer.time())

    def _open_wire(self, endpoint: str) -> MemoryWire:
        return self._network.connect(endpoint, hear=self._answered, lost=self._lost)

    def _answered(self, wire: MemoryWire, parts: Parts) -> None:
        self.core.answered(wire, parts, self._network.timer.time())
        self._turns.soon()

    def _lost(self, wire: MemoryWire, cause: str) -> None:
        self.core.lost(wire, cause, self._network.timer.time())
        self._turns.soon()


class TimedReceiver:
    """A receiver core that listens at an endpoint."""

    def __init__(
        self,
        incarnation: str,
        memory: RowMemory,
        ledger: Ledger,
        events: TransferEvents,
        network: MemoryNetwork,
        options: ReceiverOptions | None = None,
    ):
        self.endpoint = f"memory://{incarnation}"
        self._memory = memory
        self._events = events
        self._network = network
        self._turns = Turns(network.timer, self._turn)
        layout = memory.layout
        self.core = ReceiverCore(
            bytes.fromhex(incarnation), layout, ledger, events.on_state, options or ReceiverOptions()
        )
        self.counters = self.core.counters
        network.listen(self.endpoint, self._heard)

    def reserve(self, reservation: Reservation) -> None:
        self._memory.check_table(reservation.block_table)
        self.core.reserve(reservation)
        self._turns.soon()

    def rearm(self, transfer_id: str, attempt: int, deadline: float) -> tuple[Extent, ...]:
        self._turns.soon()
        return self.core.rearm(transfer_id, attempt, deadline)

    def cancel(self, transfer_id: str, cause: str) -> bool:
        self._turns.soon()
        return self.core.cancel(transfer_id, cause, self._network.timer.time())

    def release(self, transfer_id: str) -> bool:
        self._turns.soon()
        return self.core.release(transfer_id, self._network.timer.time())

    def restate(self) -> None:
        self.core.restate()

    def close(self) -> None:
        self._network.stop_listening(self.endpoint)

    def _heard(self, link: bytes, parts: Parts) -> None:
        write = self.core.received(link, parts, self._network.timer.time())
        if write is not None:
            intact = is_intact(*parts)
            if intact:
                copy_rows(self._memory, write, memoryview(parts[1]))
            self.core.written(write, intact=intact)
        self._carry_out()
        self._turns.soon()

    def _turn(self, now: float) -> float | None:
        call_at = self.core.tick(now)
        self._carry_out()
        return call_at

    def _carry_out(self) -> None:
        while self.core.outbox:
            match self.core.outbox.popleft():
                case Reply() as reply:
                    if not self._network.answer(reply.link, [reply.header, reply.body]):
                        self.core.not_sent(reply.link, is_lost=True)
                case ClaimedTransfer() as claimed:
                    self._events.on_ready(claimed)
                case FailedTransfer() as failed:
                    self._events.on_failed(failed)
