"""What the store holds of a request's transfers at this moment, told as ledger events: for `isthmus explain`."""

from collections.abc import Sequence

from isthmus.clock import LoopClock
from isthmus.ledger import LedgerEvent
from kv_transfer.ownership.store import HandoffRecord, OwnershipStore, StoreUnavailable

EVENT = "handoff.stored"
NOT_STORED = "NOT_STORED"  # the cause of an event where the store holds no record, or none that makes sense
READ_TIMEOUT_S = 0.5  # for one answer, however many transfers it tells of


class StoredHandoffs:
    """Reads handoff records; changes nothing. One event loop, that of the store."""

    def __init__(self, store: OwnershipStore, clock: LoopClock):
        self._store = store
        self._clock = clock

    async def read(self, request_id: str, transfer_ids: Sequence[str]) -> list[LedgerEvent]:
        """One event for each transfer, of sequence 0 since no ledger has it.

        Its fields are the record's state, decode and prefill incarnations. Where there is no record the cause is
        NOT_STORED; where the store does not answer within READ_TIMEOUT_S, for all of them together, the cause is
        StoreUnavailable's reason.
        """
        events: list[LedgerEvent] = []
        try:
            async with self._clock.timeout(READ_TIMEOUT_S):
                for transfer_id in transfer_ids:
                    record = await self._store.find_handoff(transfer_id)
                    events.append(self._event(request_id, transfer_id, record))
        except (StoreUnavailable, TimeoutError):
            for transfer_id in transfer_ids[len(events) :]:
                events.append(self._away(request_id, transfer_id))
        return events

    def _event(self, request_id: str, transfer_id: str, record: HandoffRecord | None) -> LedgerEvent:
        if record is None:
            return LedgerEvent(0, self._clock.now_ns(), EVENT, request_id, transfer_id, cause=NOT_STORED)
        fields = {"state": record.state.value, "decode": record.decode, "prefill": record.prefill or "-"}
        now_ns = self._clock.now_ns()
        return LedgerEvent(0, now_ns, EVENT, request_id, transfer_id, record.attempt, fields=fields)

    def _away(self, request_id: str, transfer_id: str) -> LedgerEvent:
        return LedgerEvent(0, self._clock.now_ns(), EVENT, request_id, transfer_id, cause=StoreUnavailable.reason)
