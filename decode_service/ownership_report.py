"""What the store is told of this worker's handoffs and streams; every call returns at once, Redis follows."""

from collections.abc import Callable

from kv_transfer.ownership.mirror import HandoffMirror
from kv_transfer.ownership.store import HandoffRecord, OwnershipStore, Transition
from kv_transfer.transfers import StateChange

TTL_S = 30.0  # bounds what a killed worker leaves behind
REFRESH_S = 10.0


class OwnershipReport:
    """Any thread may report; the mirror keeps the order."""

    def __init__(self, mirror: HandoffMirror, incarnation: str):
        self._mirror = mirror
        self._incarnation = incarnation
        self._round = 0

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
        transition = Transition(transfer.transfer_id, change.previous, transfer.state, transfer.attempt, prefill)
        self._mirror.report(lambda store: store.advance_handoff(transition))

    def stream_began(self, request_id: str) -> None:
        self._mirror.report(lambda store: store.streams.put(request_id, self._incarnation, TTL_S))

    def stream_ended(self, request_id: str) -> None:
        self._mirror.report(lambda store: store.streams.drop(request_id, self._incarnation))

    def again(self, restate: Callable[[], None]) -> None:
        """`restate` reports everything anew, in the mirror's loop and turn; of several that wait only the last does."""
        self._round += 1
        number = self._round

        async def turn(_: OwnershipStore) -> None:
            if number == self._round:
                restate()

        self._mirror.report(turn)
