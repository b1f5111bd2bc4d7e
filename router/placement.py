"""A place for a request: a prefill worker that is not too far behind, and blocks set aside on a decode worker."""

from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from isthmus.clock import Clock
from isthmus.convert import request_to_proto
from isthmus.errors import InvalidRequest, IsthmusError, NumericsMismatch, Overloaded, StaleOwner, WorkersUnavailable
from isthmus.types import FinishReason, Request
from isthmus.v1 import decode_pb2, types_pb2
from router import policy
from router.admission import Admission, Line, Order
from router.affinity import PrefixAffinity
from router.decode_stream import DecodeStream
from router.inbox import Source
from router.policy import NumericsClass
from router.session import ANSWER_TIMEOUT_S
from router.worker_pool import WorkerPool
from router.workers import DecodeWorker, PrefillWorker

RETRY_INTERVAL_S = 0.25  # asks full workers again, also when this router saw no room come
GONE_WAIT_S = 2.0  # for a worker to come back
RECOVERY_WAIT_S = 30.0  # the same for a request that had its place: longer than a worker takes to start
MOVE_ANSWER_S = 0.3  # to the reservation of a running stream
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request and its bounds, on the router's clock."""

    request: Request  # numerics_digest set
    numerics: NumericsClass
    order: Order
    prefixes: Sequence[bytes]  # of the prompt, for affinity
    queue_deadline: float
    deadline: float
    retention_s: int = 0  # 0: the request ends with its client

    def with_patience(self, now: float) -> "Job":
        """For another try, when a worker was lost."""
        return replace(self, queue_deadline=min(self.deadline, now + RECOVERY_WAIT_S))

    @property
    def num_positions(self) -> int:
        """Cache positions the request may need: the last token's own latent is never stored."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens - 1


@dataclass(frozen=True, slots=True)
class Ask:
    """One attempt to place a job."""

    job: Job
    counter: int  # of the attach
    source: Source  # hears the decode worker
    avoid: AbstractSet[str] = frozenset()  # workers that failed this job before, if there are others
    is_patient: bool = False  # it had its place and lost it: it waits longer for a worker to exist
    holds_blocks: bool = False  # others may wait for those: it waits for nobody's turn at prefill
    moves: bool = False  # another decode worker brings the blocks


@dataclass(eq=False, slots=True)
class PrefillPlace:
    """This request's share of a prefill worker's queue."""

    worker: PrefillWorker
    num_prompt_tokens: int
    num_tokens_ahead: int

    def computed_up_to(self, num_tokens: int) -> None:
        """So much of the prompt is left to compute no longer."""
        ahead = max(0, min(self.num_tokens_ahead, self.num_prompt_tokens - num_tokens))
        self.worker.num_tokens_ahead -= self.num_tokens_ahead - ahead
        self.num_tokens_ahead = ahead

    def give_back(self) -> None:
        self.computed_up_to(self.num_prompt_tokens)


@dataclass(frozen=True, slots=True)
class DecodePlace:
    worker: DecodeWorker
    stream: DecodeStream
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Placed:
    prefill: PrefillPlace
    decode: DecodePlace


class Placement:
    """Waits are bounded, in order of admission, and nothing is held after `place` is left, whatever happened inside."""

    def __init__(self, pool: WorkerPool, admission: Admission, clock: Clock):
        self._pool = pool
        self._admission = admission
        self._clock = clock
        self._affinity = PrefixAffinity()
        self.quarantine = Line(1)  # for requests that two workers were lost with

    async def numerics_class(self, queue_deadline: float) -> NumericsClass:
        """The class a new request will belong to. Raises WorkersUnavailable when there is none for a while."""
        started_at = self._clock.now()
        while True:
            decode = [worker.view(0) for worker in self._pool.usable_decode()]
            prefill = [worker.view(0) for worker in self._pool.usable_prefill()]
            if found := policy.choose_class(decode, prefill):
                return found
            missing = "decode" if not decode else "prefill" if not prefill else "pair of prefill and decode"
            await self._wait_until(min(queue_deadline, started_at + GONE_WAIT_S), _unavailable(missing))

    @asynccontextmanager
    async def place(self, ask: Ask) -> AsyncIterator[Placed]:
        """Prefill first: blocks are set aside only when somebody can fill them soon."""
        async with self.prefill_place(ask) as prefill, self._decode_place(ask) as decode:
            incarnations = (prefill.worker.record.incarnation, decode.worker.record.incarnation)
            self._affinity.remember(ask.job.prefixes, incarnations)
            yield Placed(prefill, decode)

    @asynccontextmanager
    async def prefill_place(self, ask: Ask) -> AsyncIterator[PrefillPlace]:
        job, started_at = ask.job, self._clock.now()
        async with self._admission.placing.turn(job.order, job.queue_deadline - started_at):
            while isinstance(worker := self._choose_prefill(ask), IsthmusError):
                await self._wait(worker, ask, started_at)
            num_tokens = len(job.request.prompt_token_ids)
            place = PrefillPlace(worker, num_tokens, num_tokens)
            worker.num_tokens_ahead += place.num_tokens_ahead
        try:
            yield place
        finally:
            place.give_back()
            self._pool.note_change()

    @asynccontextmanager
    async def reserved(self, place: DecodePlace) -> AsyncIterator[DecodePlace]:
        """Around whatever a stream's reservation is used for."""
        try:
            yield place
        finally:
            place.stream.end(FinishReason.CANCELLED)
            place.worker.reserved_blocks -= place.num_blocks
            place.stream.close()

    async def try_decode(self, ask: Ask) -> DecodePlace | IsthmusError:
        """A place at a decode worker that has room now; nobody waits."""
        try:
            return await self._ask_each(ask, timeout_s=MOVE_ANSWER_S)
        except (InvalidRequest, StaleOwner) as refusal:
            return refusal

    @asynccontextmanager
    async def _decode_place(self, ask: Ask) -> AsyncIterator[DecodePlace]:
        job, started_at = ask.job, self._clock.now()
        # Somebody waits for blocks: who comes now stands in line behind.
        place = await self._ask_each(ask) if self._admission.reserving.num_free else None
        if not isinstance(place, DecodePlace):
            async with self._admission.reserving.turn(job.order, job.queue_deadline - started_at):
                while isinstance(place := await self._ask_each(ask), IsthmusError):
                    await self._wait(place, ask, started_at)
        async with self.reserved(place):
            yield place

    def _choose_prefill(self, ask: Ask) -> PrefillWorker | IsthmusError:
        usable = self._pool.usable_prefill()
        workers = {worker.record.incarnation: worker for worker in usable if worker.numerics == ask.job.numerics}
        if not workers:
            return _none_left("prefill", has_others=bool(usable))
        views = [worker.view(self._num_prefix_tokens(ask.job, key)) for key, worker in workers.items()]
        chosen = policy.choose_prefill(views, avoid=ask.avoid, holds_blocks=ask.holds_blocks)
        return workers[chosen] if chosen else Overloaded("all prefill workers are busy")

    async def _ask_each(self, ask: Ask, *, timeout_s: float = ANSWER_TIMEOUT_S) -> DecodePlace | IsthmusError:
        """Asks decode workers in order of preference; the last refusal when none has room now."""
        job, usable = ask.job, self._pool.usable_decode()
        workers = {worker.record.incarnation: worker for worker in usable if worker.numerics == job.numerics}
        if not workers:
            return _none_left("decode", has_others=bool(usable))
        views = [worker.view(self._num_prefix_tokens(job, key)) for key, worker in workers.items()]
        ranked = policy.rank_decode(views, job.num_positions, avoid=ask.avoid)
        if not ranked:
            most = max(view.total_blocks * view.block_size for view in views)
            given = f"{job.num_positions} positions of prompt and max_tokens"
            raise InvalidRequest.of("sampling.max_tokens", given, f"at most {most}, the largest decode worker's cache")
        room: IsthmusError | None = None
        stale: StaleOwner | None = None
        for incarnation in ranked:
            answer = await self._ask_one(ask, workers[incarnation], timeout_s)
            if isinstance(answer, DecodePlace):
                return answer
            self._note_refused(ask, workers[incarnation], answer)
            room = answer if isinstance(answer, Overloaded) else room
            stale = answer if isinstance(answer, StaleOwner) else stale
        if stale is not None and room is None:  # waiting in line would not help, and hold up the others
            raise stale
        return room or _unavailable("decode")

    def _num_prefix_tokens(self, job: Job, incarnation: str) -> int:
        return self._affinity.num_prefix_tokens(job.prefixes, incarnation)

    def _note_refused(self, ask: Ask, worker: DecodeWorker, refusal: IsthmusError) -> None:
        request_id, name = ask.job.request.request_id, worker.record.name
        self._pool.ledger.record(
            "placement.refused", request_id=request_id, cause=refusal.reason, worker=name, detail=refusal.detail
        )

    async def _ask_one(self, ask: Ask, worker: DecodeWorker, timeout_s: float) -> DecodePlace | IsthmusError:
        """Raises InvalidRequest, which every worker would answer; returns any other refusal."""
        num_blocks = worker.record.layout.num_blocks(ask.job.num_positions)
        remaining_s = ask.job.deadline - self._clock.now()
        retains = ask.job.retention_s > 0
        reserve = decode_pb2.Reserve(
            request=request_to_proto(replace(ask.job.request, timeout_s=remaining_s)),
            attach=worker.session.attach_id(ask.counter),
            on_disconnect=types_pb2.ON_DISCONNECT_RETAIN if retains else types_pb2.ON_DISCONNECT_ABORT,
            retention_s=ask.job.retention_s,
            moves=ask.moves,
        )
        worker.reserved_blocks += num_blocks  # from now on, so that the next request already counts it
        try:
            stream = await worker.session.reserve(reserve, ask.source, timeout_s=min(remaining_s, timeout_s))
        except BaseException as error:
            worker.reserved_blocks -= num_blocks
            if isinstance(error, IsthmusError) and not isinstance(error, InvalidRequest):
                return error
            raise
        return DecodePlace(worker, stream, num_blocks)

    async def _wait(self, refusal: IsthmusError, ask: Ask, started_at: float) -> None:
        """A moment, or until something changed; raises `refusal` after waiting long enough since `started_at`.

        For room that is as long as the queue allows; for a worker to exist only a moment, but for a recovery as long.
        """
        is_gone = not isinstance(refusal, Overloaded) and not ask.is_patient
        deadline = min(ask.job.queue_deadline, started_at + GONE_WAIT_S) if is_gone else ask.job.queue_deadline
        await self._wait_until(deadline, refusal)

    async def _wait_until(self, deadline: float, refusal: IsthmusError) -> None:
        remaining_s = deadline - self._clock.now()
        if remaining_s <= 0:
            refusal.retry_after_s = refusal.retry_after_s or RETRY_AFTER_S
            raise refusal
        await self._pool.wait_for_change(min(remaining_s, RETRY_INTERVAL_S))


def _none_left(role: str, *, has_others: bool) -> IsthmusError:
    if has_others:
        return NumericsMismatch(f"the {role} workers left are not of the request's numerics class")
    return _unavailable(role)


def _unavailable(missing: str) -> WorkersUnavailable:
    return WorkersUnavailable(f"no {missing} worker of the needed kind is available", retry_after_s=RETRY_AFTER_S)
