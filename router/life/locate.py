"""Where a stream is: the worker that the registry's hint names, else whoever says it has it. A core."""

from collections.abc import Callable, Sequence
from typing import Protocol

from isthmus.errors import IsthmusError, StreamGone, WorkersUnavailable
from isthmus.process.loop_driver import Drive
from isthmus.routine import Answer, Routine
from isthmus.types import FinishReason
from router.pool.decode_stream import Inbox, Source
from router.pool.placement import DecodePlace
from router.pool.session import ANSWER_TIMEOUT_S
from router.pool.worker_pool import DecodeWorker, WorkerPool

HINT_WAIT_S = 0.2  # the registry bounds itself; this is for one that does not
FIND_WAIT_S = 1.2
ASK_AGAIN_S = 0.01  # whether a cancelled stream has gone; its step ends first
SESSIONS_WAIT_S = 1.0  # a router that has just started meets its workers first


class StreamHint(Protocol):
    """The registry, as far as it knows streams."""

    def find_stream(self, request_id: str, answer: Answer[str | None]) -> None:
        """The incarnation of the decode worker it names; None when it names none."""
        ...


class Locator:
    """Holds nothing; every call is a part of the caller's routine."""

    def __init__(self, pool: WorkerPool, registry: StreamHint):
        self._pool = pool
        self._registry = registry

    async def attach(self, request_id: str, next_index: int, source: Source, routine: Routine) -> DecodePlace:
        """Takes the stream over. Raises StreamGone when nobody has it, IndexOutOfRange."""
        deadline = routine.now + SESSIONS_WAIT_S
        asked: set[str] = set()
        while True:
            alive = {key: w for key, w in self._pool.decode.items() if w.session.is_alive and key not in asked}
            asked |= alive.keys()
            hinted = alive.pop(await self._hint(request_id, routine) or "", None)
            if hinted and (place := await self._try(hinted, request_id, next_index, source, routine)):
                return place
            for worker in await self._having(request_id, list(alive.values()), routine):
                if place := await self._try(worker, request_id, next_index, source, routine):
                    return place
            if routine.now >= deadline or not self._pool.has_unmet:
                raise StreamGone("no decode worker has this stream; continue it with its seed and emitted_token_ids")
            await self._pool.change(routine, deadline)

    async def has(self, request_id: str, routine: Routine) -> bool:
        """Whether any worker this router speaks with has the stream."""
        alive = [worker for worker in self._pool.decode.values() if worker.session.is_alive]
        return bool(await self._having(request_id, alive, routine))

    async def cancel(self, request_id: str, routine: Routine) -> bool:
        """Ends a stream of any router, and what is kept of a finished one. False when nobody has it.

        Returns once the worker says that it has nothing of it: a Resume at any router then finds nothing either.
        """
        inbox = Inbox(routine.wake, lambda: None, max_tokens=0)
        try:
            place = await self.attach(request_id, 0, Source(inbox), routine)
        except IsthmusError:
            return False
        with place:
            place.stream.end(FinishReason.CANCELLED, forgets_kept=True)
            deadline = routine.now + ANSWER_TIMEOUT_S
            while await self._having(request_id, [place.worker], routine) and routine.now < deadline:
                await routine.wait_for(lambda: False, routine.now + ASK_AGAIN_S)
        return True

    async def _try(
        self, worker: DecodeWorker, request_id: str, next_index: int, source: Source, routine: Routine
    ) -> DecodePlace | None:
        """None when it is not there after all; raises any other refusal."""
        try:
            stream = worker.session.attach(request_id, next_index, source, routine.now)
        except WorkersUnavailable:
            return None
        place = DecodePlace(worker, stream, 0)
        try:
            refusal = await stream.refusal(routine, routine.now + ANSWER_TIMEOUT_S)
        except BaseException:
            place.give_up()
            raise
        if refusal is None:
            return place
        place.give_up()
        if isinstance(refusal, StreamGone | WorkersUnavailable):
            return None
        raise refusal

    async def _hint(self, request_id: str, routine: Routine) -> str | None:
        answer: Answer[str | None] = Answer(routine.wake)
        self._registry.find_stream(request_id, answer)
        came = await routine.wait_for(lambda: answer.has_come, routine.now + HINT_WAIT_S)
        return answer.value if came else None

    async def _having(self, request_id: str, workers: Sequence[DecodeWorker], routine: Routine) -> list[DecodeWorker]:
        """The one that is furthest first: a worker that froze may wake with an older copy."""
        answers: list[Answer[int | None]] = [Answer(routine.wake) for _ in workers]
        for worker, answer in zip(workers, answers, strict=True):
            worker.link.find(request_id, answer)
        await routine.wait_for(lambda: all(answer.has_come for answer in answers), routine.now + FIND_WAIT_S)
        having: list[tuple[int, DecodeWorker]] = []
        for worker, answer in zip(workers, answers, strict=True):
            if answer.has_come and answer.value is not None:
                having.append((answer.value, worker))
        return [worker for _, worker in sorted(having, key=lambda pair: -pair[0])]


class StreamCancel:
    """A Cancel for a stream that is not this router's: looked for, taken over, ended. Written by its own routine."""

    def __init__(self, locator: Locator, drive: Drive):
        self._locator = locator
        self._driver = drive(self.turn)
        self._routine = Routine(self._driver.ready)

    def begin(self, request_id: str, on_answer: Callable[[bool], None]) -> None:
        """`on_answer` hears whether anybody had the stream."""

        async def work() -> None:
            on_answer(await self._locator.cancel(request_id, self._routine))

        self._routine.begin(work())

    def turn(self, now: float) -> float | None:
        return self._routine.turn(now)
