"""What the store is told of this worker's handoffs and streams; every call returns at once, Redis follows."""

from kv_transfer.mirror import HandoffMirror
from kv_transfer.ownership import HandoffRecord, Transition
from kv_transfer.transfers import StateChange

TTL_S = 900.0  # outlives the longest request (router: max_timeout_s 600); bounds what a killed worker leaves behind


class OwnershipReport:
    """Any thread may report; the mirror keeps the order."""

    def __init__(self, mirror: HandoffMirror, incarnation: str):
        self._mirror = mirror
        self._incarnation = incarnation

    def handoff_changed(self, change: StateChange) -> None:
        """Follows the receiver's state machine, change by change."""
        transfer = change.transfer
        prefill = None if transfer.sender is None else transfer.sender.hex()
        if change.previous is None:
            record = HandoffRecord(
                transfer.transfer_id, transfer.request_id, self._incarnation, prefill, transfer.attempt, transfer.state
            )
            self._mirror.report(lambda store: store.begin_handoff(record, TTL_S))
            return
        transition = Transition(
            transfer.transfer_id, change.previous, transfer.state, transfer.attempt, prefill=prefill
        )
        self._mirror.report(lambda store: store.advance_handoff(transition))

    def stream_began(self, request_id: str) -> None:
        self._mirror.report(lambda store: store.streams.put(request_id, self._incarnation, TTL_S))

    def stream_ended(self, request_id: str) -> None:
        self._mirror.report(lambda store: store.streams.drop(request_id, self._incarnation))
