"""What the cores of a decode worker reach of the world outside, as protocols.

Behind each stands a driver, or a simulator. All of them are called in the event loop and return at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from decode_service.step_messages import StepCommand
from isthmus.ids import Ids
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.transfers import Reservation

# What became of a transfer, and the time; called in the event loop, once.
OnMoved = Callable[[TransferOutcome, float], None]


class BlockReceiver(Protocol):
    """Writes blocks that other workers send; `kv_transfer.receiver.Receiver` says what each call promises."""

    def reserve(self, reservation: Reservation) -> None: ...

    def rearm(self, transfer_id: str, attempt: int, deadline: float) -> tuple[Extent, ...]: ...

    def cancel(self, transfer_id: str, cause: str) -> bool: ...

    def release(self, transfer_id: str) -> bool: ...

    def restate(self) -> None: ...


class OutgoingMove(Protocol):
    """A stream's blocks and tokens on their way to another worker; as `kv_transfer.outgoing.OutgoingTransfer`."""

    def rows_ready(self, plane: str, layer: int, first: int, n: int) -> None: ...

    def commit(self, *tokens: Token) -> None: ...

    def abort(self, reason: str) -> None: ...


class BlockSender(Protocol):
    """Sends a stream's blocks to another decode worker."""

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnMoved, *, request_id: str
    ) -> OutgoingMove:
        """`on_done` follows exactly once, later. Raises IsthmusError or ValueError; then `on_done` is not called."""
        ...


class StreamReport(Protocol):
    """Tells the store which streams somebody may look for here."""

    def stream_began(self, request_id: str) -> None: ...

    def stream_ended(self, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class DecodePorts:
    receiver: BlockReceiver
    sender: BlockSender
    report: StreamReport
    post: Callable[[StepCommand], None]  # to the step loop
    ids: Ids
