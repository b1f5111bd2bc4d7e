"""What the prefill loop is given to work with: an engine, a sender, the time within a step, and instruments."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from isthmus.types import Token, TransferTarget
from isthmus.worker.engine_port import PrefillEngine
from isthmus.worker.instruments import Instruments
from kv_transfer.outgoing import OnDone


class PromptTransfer(Protocol):
    """One prompt's blocks on their way to a decode worker. The methods only hand a message over; they never wait."""

    def rows_ready(self, plane: str, layer: int, first: int, n: int) -> None:
        """Positions [first, first + n) of this place are final in the pool. What the target misses goes out, once."""
        ...

    def commit(self, *tokens: Token) -> None:
        """Every token so far, after the last `rows_ready`."""
        ...

    def abort(self, reason: str, *, finished: bool = False) -> None:
        """Ends the transfer and tells the receiver to free. `finished`: the request needs no decode."""
        ...


class TransferSender(Protocol):
    """Opens transfers; `kv_transfer.sender.Sender` is one, a simulator brings another."""

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnDone, *, request_id: str = ""
    ) -> PromptTransfer:
        """`on_done` follows exactly once, from a thread of the sender's; until then the blocks are read.

        Raises an IsthmusError when it takes no more, or does not fit the target; then `on_done` is not called.
        """
        ...


@dataclass(frozen=True, slots=True)
class LoopPorts:
    """Made once by the worker's wiring. Everything here may be used from any thread."""

    engine: PrefillEngine
    sender: TransferSender
    # Seconds, on the clock that turns are told the time of. A step takes long: between two of its layers a deadline
    # may pass, and the spans that are reported end when it ends. So within a step the time is asked for anew.
    now: Callable[[], float]
    instruments: Instruments
