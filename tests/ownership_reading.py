"""Ownership in Redis, handoffs read as well: no service does, what they wrote is for tests and people to look at."""

from functools import partial

from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.ownership.records import BadRecord, check_incarnation
from kv_transfer.ownership.redis import RedisOwnership
from kv_transfer.ownership.store import HandoffRecord


class ReadableOwnership(RedisOwnership):
    async def find_handoff(self, transfer_id: str) -> HandoffRecord | None:
        """None also for what makes no sense, which is counted."""
        command = self._connection.client.hgetall(f"handoff:{transfer_id}")
        return await self._connection.read("handoff", partial(decode_handoff, transfer_id=transfer_id), command)


def decode_handoff(raw: dict[bytes, bytes], transfer_id: str) -> HandoffRecord:
    try:
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        return HandoffRecord(
            transfer_id=transfer_id,
            request_id=fields["request_id"],
            decode=check_incarnation(fields["decode"]),
            prefill=check_incarnation(fields["prefill"]) if fields["prefill"] else None,
            attempt=int(fields["attempt"]),
            state=HandoffState(fields["state"]),
        )
    except (KeyError, ValueError) as error:
        raise BadRecord(str(error)) from error
