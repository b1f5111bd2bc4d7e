"""A place for a request: a prefill worker that is not too far behind, and blocks set aside on a decode worker."""

from collections.abc import AsyncIterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from isthmus.clock import Clock
from isthmus.convert import request_to_proto
from isthmus.errors import InvalidRequest, IsthmusError, NumericsMismatch, Overloaded, WorkersUnavailable
from isthmus.types import FinishReason, Request
from isthmus.v1 import decode_pb2
from router import policy
from router.admission import Admission, Order
from router.affinity import PrefixAffinity
from router.inbox import Inbox
from router.policy import NumericsClass
from router.session import DecodeStream
from router.worker_pool import WorkerPool
from router.workers import DecodeWorker, PrefillWorker

RETRY_INTERVAL_S = 0.25  # asks full workers again, also when this router saw no room come
GONE_WAIT_S = 2.0  # for a worker to come back
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

    @property
    def num_positions(self) -> int:
        """Cache positions the request may need: the last token's own latent is never stored."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens - 1


@dataclass(frozen=True, slots=True)
class Ask:
    """One attempt to place a job."""

    job: Job
    attempt: int
    inbox: Inbox
    avoid: AbstractSet[str]  # workers that failed this job before, if there are others


@dataclass(eq=False, slots=True)
class PrefillPlace:
    """This request's share of a prefill worker's queue."""

    worker: PrefillWorker
    num_tokens_ahead: int

    def computed(self, num_tokens: int) -> None:
        """`num_tokens` of the prompt are left to compute no longer."""
        num_tokens = max(0, min(num_tokens, self.num_tokens_ahead))
        self.num_tokens_ahead -= num_tokens
        self.worker.num_tokens_ahead -= num_tokens


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

    async def numerics_class(self, queue_deadline: float) -> NumericsClass:
        """The class a new request will belong to. Raises WorkersUnavailable when there is none for a while."""
        started_at = self._clock.now()
        while True:
            decode = [worker.view(0) for worker in self._pool.usable_decode()]
            prefill = [worker.view(0) for worker in self._pool.usable_prefill()]
            if found := policy.choose_class(decode, prefill):
                return found
            missing = "decode" if not decode else "prefill" if not prefill else "pair of prefill and decode"
            await self._wait(_unavailable(missing), started_at, queue_deadline)

    @asynccontextmanager
    async def place(self, ask: Ask) -> AsyncIterator[Placed]:
        """Prefill first: blocks are set aside only when somebody can fill them soon."""
        async with self._prefill_place(ask) as prefill, self._decode_place(ask) as decode:
            incarnations = (prefill.worker.record.incarnation, decode.worker.record.incarnation)
            self._affinity.remember(ask.job.prefixes, incarnations)
            yield Placed(prefill, decode)

    @asynccontextmanager
    async def _prefill_place(self, ask: Ask) -> AsyncIterator[PrefillPlace]:
        job, started_at = ask.job, self._clock.now()
        async with self._admission.placing.turn(job.order, job.queue_deadline - started_at):
            while isinstance(worker := self._choose_prefill(ask), IsthmusError):
                await self._wait(worker, started_at, job.queue_deadline)
            place = PrefillPlace(worker, len(job.request.prompt_token_ids))
            worker.num_tokens_ahead += place.num_tokens_ahead
        try:
            yield place
        finally:
            place.computed(place.num_tokens_ahead)
            self._pool.note_change()

    @asynccontextmanager
    async def _decode_place(self, ask: Ask) -> AsyncIterator[DecodePlace]:
        job, started_at = ask.job, self._clock.now()
        # Somebody waits for blocks: who comes now stands in line behind.
        place = await self._ask_each(ask) if self._admission.reserving.num_free else None
        if not isinstance(place, DecodePlace):
            async with self._admission.reserving.turn(job.order, job.queue_deadline - started_at):
                while isinstance(place := await self._ask_each(ask), IsthmusError):
                    await self._wait(place, started_at, job.queue_deadline)
        try:
            yield place
        finally:
            place.stream.end(FinishReason.CANCELLED)
            place.worker.reserved_blocks -= place.num_blocks
            place.stream.close()

    def _choose_prefill(self, ask: Ask) -> PrefillWorker | IsthmusError:
        usable = self._pool.usable_prefill()
        workers = {worker.record.incarnation: worker for worker in usable if worker.numerics == ask.job.numerics}
        if not workers:
            return _none_left("prefill", has_others=bool(usable))
        views = [worker.view(self._num_prefix_tokens(ask.job, key)) for key, worker in workers.items()]
        chosen = policy.choose_prefill(views, avoid=ask.avoid)
        return workers[chosen] if chosen else Overloaded("all prefill workers are busy")

    async def _ask_each(self, ask: Ask) -> DecodePlace | IsthmusError:
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
        refusal: IsthmusError = _unavailable("decode")
        for incarnation in ranked:
            answer = await self._ask_one(ask, workers[incarnation])
            if isinstance(answer, DecodePlace):
                return answer
            refusal = answer if isinstance(answer, Overloaded) else refusal
        return refusal

    def _num_prefix_tokens(self, job: Job, incarnation: str) -> int:
        return self._affinity.num_prefix_tokens(job.prefixes, incarnation)

    async def _ask_one(self, ask: Ask, worker: DecodeWorker) -> DecodePlace | IsthmusError:
        """Raises InvalidRequest, which every worker would answer; returns any other refusal."""
        num_blocks = worker.record.layout.num_blocks(ask.job.num_positions)
        remaining_s = ask.job.deadline - self._clock.now()
        request = request_to_proto(replace(ask.job.request, timeout_s=remaining_s))
        reserve = decode_pb2.Reserve(request=request, attach=worker.session.attach_id(ask.attempt))
        worker.reserved_blocks += num_blocks  # from now on, so that the next request already counts it
        try:
            stream = await worker.session.reserve(reserve, ask.inbox, timeout_s=remaining_s)
        except BaseException as error:
            worker.reserved_blocks -= num_blocks
            if isinstance(error, IsthmusError) and not isinstance(error, InvalidRequest):
                return error
            raise
        return DecodePlace(worker, stream, num_blocks)

    async def _wait(self, refusal: IsthmusError, started_at: float, queue_deadline: float) -> None:
        """A moment, or until something changed; raises `refusal` after waiting long enough since `started_at`.

        For room that is as long as the queue allows, for a worker to exist only a moment.
        """
        is_gone = not isinstance(refusal, Overloaded)
        deadline = min(queue_deadline, started_at + GONE_WAIT_S) if is_gone else queue_deadline
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
