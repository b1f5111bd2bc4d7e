"""Where a stream is: the worker that the registry's hint names, else whoever says it has it."""

import asyncio

import grpc.aio

from isthmus.clock import Clock
from isthmus.errors import IsthmusError, StreamGone, WorkersUnavailable
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2
from kv_transfer.ownership.store import StoreUnavailable
from router.inbox import Inbox, Source
from router.placement import DecodePlace
from router.worker_pool import WorkerPool
from router.workers import DecodeWorker

HINT_TIMEOUT_S = 0.1
FIND_TIMEOUT_S = 1.0
SESSIONS_WAIT_S = 1.0  # a router that has just started meets its workers first


class Locator:
    """Event loop only."""

    def __init__(self, pool: WorkerPool, clock: Clock):
        self._pool = pool
        self._clock = clock

    async def attach(self, request_id: str, next_index: int, source: Source) -> DecodePlace:
        """Takes the stream over. Raises StreamGone when nobody has it, IndexOutOfRange."""
        deadline = self._clock.now() + SESSIONS_WAIT_S
        asked: set[str] = set()
        while True:
            alive = {key: w for key, w in self._pool.decode.items() if w.session.is_alive and key not in asked}
            asked |= alive.keys()
            hinted = alive.pop(await self._hint(request_id) or "", None)
            if hinted and (place := await self._try(hinted, request_id, next_index, source)):
                return place
            for worker in await self._having(request_id, list(alive.values())):
                if place := await self._try(worker, request_id, next_index, source):
                    return place
            remaining_s = deadline - self._clock.now()
            if remaining_s <= 0 or not self._pool.has_unmet:
                raise StreamGone("no decode worker has this stream; continue it with its seed and emitted_token_ids")
            await self._pool.wait_for_change(remaining_s)

    async def _try(self, worker: DecodeWorker, request_id: str, next_index: int, source: Source) -> DecodePlace | None:
        try:
            return DecodePlace(worker, await worker.session.attach(request_id, next_index, source), 0)
        except (StreamGone, WorkersUnavailable):
            return None

    async def has(self, request_id: str) -> bool:
        """Whether any worker this router speaks with has the stream."""
        return bool(await self._having(request_id, [w for w in self._pool.decode.values() if w.session.is_alive]))

    async def cancel(self, request_id: str) -> bool:
        """Ends a stream of any router, and what is kept of a finished one. False when nobody has it."""
        source = Source(Inbox(self._clock.now, lambda: None, max_tokens=0))
        try:
            place = await self.attach(request_id, 0, source)
        except IsthmusError:
            return False
        place.stream.end(FinishReason.CANCELLED)
        place.stream.close()
        return True

    async def _hint(self, request_id: str) -> str | None:
        try:
            async with asyncio.timeout(HINT_TIMEOUT_S):
                return await self._pool.store.streams.find(request_id)
        except (StoreUnavailable, TimeoutError):
            return None

    async def _having(self, request_id: str, workers: list[DecodeWorker]) -> list[DecodeWorker]:
        """The one that is furthest first: a worker that froze may wake with an older copy."""
        known = await asyncio.gather(*(self._num_known(worker, request_id) for worker in workers))
        having = [
            (num_known, worker) for num_known, worker in zip(known, workers, strict=True) if num_known is not None
        ]
        return [worker for _, worker in sorted(having, key=lambda pair: -pair[0])]

    async def _num_known(self, worker: DecodeWorker, request_id: str) -> int | None:
        """Tokens of the stream there; None when it is not."""
        try:
            request = decode_pb2.FindRequest(request_id=request_id)
            answer = await worker.session.stub.Find(request, timeout=FIND_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
        return answer.next_index if answer.found else None
