"""What the store holds of a request's transfers at this moment, told as ledger events: for `isthmus explain`."""

from collections.abc import Sequence

from isthmus.clock import LoopClock
from isthmus.ledger import LedgerEvent
from isthmus.process.admin import NOT_STORED, STORED_EVENT
from kv_transfer.ownership.store import HandoffRecord, OwnershipStore, StoreUnavailable

READ_TIMEOUT_S = 0.5  # for one answer, however many transfers it tells of


class StoredHandoffs:
    """Reads handoff records; changes nothing. One event loop, that of the store."""

    def __init__(self, store: OwnershipStore, clock: LoopClock):
        self._store = store
        self._clock = clock

    async def read(self, request_id: str, transfer_ids: Sequence[str]) -> list[LedgerEvent]:
        """One STORED_EVENT for each transfer, of sequence 0 since no ledger has it.

        Its fields are the record's state, decode and prefill incarnations. Where there is no record that makes sense,
        the cause is NOT_STORED. READ_TIMEOUT_S holds for all transfers together; those that the store did not answer
        for in time have StoreUnavailable's reason as their cause.
        """
        events: list[LedgerEvent] = []
        try:
            async with self._clock.timeout(READ_TIMEOUT_S):
                for transfer_id in transfer_ids:
                    record = await self._store.find_handoff(transfer_id)
                    events.append(self._event(request_id, transfer_id, record))
        except (StoreUnavailable, TimeoutError):
            for transfer_id in transfer_ids[len(events) :]:
                events.append(self._without_record(request_id, transfer_id, StoreUnavailable.reason))
        return events

    def _event(self, request_id: str, transfer_id: str, record: HandoffRecord | None) -> LedgerEvent:
        if record is None:
            return self._without_record(request_id, transfer_id, NOT_STORED)
        fields = {"state": record.state.value, "decode": record.decode, "prefill": record.prefill or "-"}
        now_ns = self._clock.now_ns()
        return LedgerEvent(0, now_ns, STORED_EVENT, request_id, transfer_id, record.attempt, fields=fields)

    def _without_record(self, request_id: str, transfer_id: str, cause: str) -> LedgerEvent:
        return LedgerEvent(0, self._clock.now_ns(), STORED_EVENT, request_id, transfer_id, cause=cause)
