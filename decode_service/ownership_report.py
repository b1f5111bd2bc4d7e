"""What the store is told of this worker's handoffs and streams. Every call returns at once; the store follows."""

from collections.abc import Callable

from kv_transfer.ownership.changes import (
    AdvanceHandoff,
    BeginHandoff,
    DropStream,
    MirroredChange,
    PutStream,
    Restate,
)
from kv_transfer.ownership.store import HandoffRecord, Transition
from kv_transfer.transfers import StateChange

TTL_S = 30.0  # bounds what a killed worker leaves behind
REFRESH_S = 10.0  # between two restatements of everything


class OwnershipReport:
    """Any thread may report. `report` hands a change to the mirror, which keeps the order."""

    def __init__(self, report: Callable[[MirroredChange], None], incarnation: str):
        self._report = report
        self._incarnation = incarnation

    def handoff_changed(self, change: StateChange) -> None:
        """Follows the receiver's state machine, change by change."""
        transfer = change.transfer
        prefill = None if transfer.sender is None else transfer.sender.hex()
        if change.previous is None:
            record = HandoffRecord(
                transfer.transfer_id, transfer.request_id, self._incarnation, prefill, transfer.attempt, transfer.state
            )
            self._report(BeginHandoff(record, TTL_S))
            return
        transition = Transition(transfer.transfer_id, change.previous, transfer.state, transfer.attempt, prefill)
        self._report(AdvanceHandoff(transition))

    def stream_began(self, request_id: str) -> None:
        self._report(PutStream(request_id, self._incarnation, TTL_S))

    def stream_ended(self, request_id: str) -> None:
        self._report(DropStream(request_id, self._incarnation))

    def again(self) -> None:
        """Everything is to be reported anew, after what waits; of several such requests that wait one is followed."""
        self._report(Restate())
