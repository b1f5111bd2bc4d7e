"""A place for a request: a prefill worker that is not too far behind, and blocks set aside on a decode worker.

A core: waits are those of the request's routine, bounded, in order of admission.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from isthmus.convert import request_to_proto
from isthmus.errors import InvalidRequest, IsthmusError, NumericsMismatch, Overloaded, StaleOwner, WorkersUnavailable
from isthmus.routine import Routine
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, prefill_pb2, types_pb2
from router.pool import policy
from router.pool.admission import Admission
from router.pool.decode_stream import DecodeStream, Failed, Source
from router.pool.policy import Need, NumericsClass, PrefixAffinity
from router.pool.session import ANSWER_TIMEOUT_S
from router.pool.worker_pool import DecodeWorker, PrefillWorker, WorkerPool

RETRY_INTERVAL_S = 0.25  # asks full workers again, also when this router saw no room come
GONE_WAIT_S = 2.0  # for a worker to come back
MOVE_ANSWER_S = 0.3  # to the reservation of a running stream
RETRY_AFTER_S = 1.0


@dataclass(eq=False, slots=True)
class PrefillPlace:
    """This request's share of a prefill worker's queue, and its call there. Written by the request's routine and by the
    call it listens to. As a context manager it ends the call and gives the share back."""

    worker: PrefillWorker
    num_prompt_tokens: int
    num_tokens_ahead: int
    on_end: Callable[[], None]
    source: Source | None = None  # hears the worker, once it is called
    drop: Callable[[], None] | None = None  # ends the call

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.source is not None and self.drop is not None:
            self.worker.calls.discard(self.source)
            self.source.close()
            self.drop()
        self.give_back()
        self.on_end()

    def begin(self, request: prefill_pb2.PrefillRequest, source: Source, timeout_s: float) -> None:
        """Progress, one FirstToken, then Done, reach `source`; or Failed."""
        self.source = source
        self.worker.calls.add(source)  # so that a hung worker's requests are told
        self.drop = self.worker.link.call(request, self, timeout_s)

    def take(self, response: prefill_pb2.PrefillResponse, at: float) -> None:
        """What a request wants to hear; not news of a later version."""
        assert self.source is not None, "a call that was begun"
        match response.WhichOneof("event"):
            case "queued":
                self.source.put(response.queued, at)
            case "progress":
                self.computed_up_to(response.progress.num_computed_tokens)
                self.source.put(response.progress, at)
            case "first_token":
                self.give_back()
                self.source.put(response.first_token, at)
            case "done":
                self.source.put(response.done, at)
            case _:
                pass

    def failed(self, failure: Failed, at: float) -> None:
        """The call is over without a Done."""
        assert self.source is not None, "a call that was begun"
        self.source.put(replace(failure, has_others=len(self.worker.calls) > 1), at)

    def computed_up_to(self, num_tokens: int) -> None:
        """So much of the prompt is left to compute no longer."""
        ahead = max(0, min(self.num_tokens_ahead, self.num_prompt_tokens - num_tokens))
        self.worker.num_tokens_ahead -= self.num_tokens_ahead - ahead
        self.num_tokens_ahead = ahead

    def give_back(self) -> None:
        self.computed_up_to(self.num_prompt_tokens)


@dataclass(eq=False, slots=True)
class DecodePlace:
    """A stream at a decode worker, and the blocks counted for it. As a context manager it ends the stream and closes
    its source."""

    worker: DecodeWorker
    stream: DecodeStream
    num_blocks: int
    is_over: bool = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_up()
        self.stream.source.close()

    def give_up(self) -> None:
        """Once: the worker is told to free everything. The source stays open: another worker may be asked for it."""
        if not self.is_over:
            self.is_over = True
            self.stream.end(FinishReason.CANCELLED)
            self.worker.reserved_blocks -= self.num_blocks
            self.stream.session.forget(self.stream)


class Placement:
    """Shared by all requests of a router; written by itself alone. Nothing is held once a place is left."""

    def __init__(self, pool: WorkerPool, admission: Admission):
        self._pool = pool
        self._admission = admission
        self._affinity = PrefixAffinity()

    async def numerics_class(self, queue_deadline: float, routine: Routine) -> NumericsClass:
        """The class a new request will belong to. Raises WorkersUnavailable when there is none for a while."""
        until = min(queue_deadline, routine.now + GONE_WAIT_S)
        while True:
            decode = [worker.view(0) for worker in self._pool.usable_decode(routine.now)]
            prefill = [worker.view(0) for worker in self._pool.usable_prefill(routine.now)]
            if found := policy.choose_class(decode, prefill):
                return found
            missing = "decode" if not decode else "prefill" if not prefill else "pair of prefill and decode"
            await self._wait_until(until, _unavailable(missing), routine)

    async def prefill(self, need: Need, routine: Routine) -> PrefillPlace:
        """In turn: a worker with few tokens ahead. Raises Overloaded, WorkersUnavailable, NumericsMismatch."""
        began_at = routine.now
        with self._admission.placing.enter(need.order, routine.wake) as turn:
            await turn.comes(routine, need.queue_deadline)
            while isinstance(worker := self._choose_prefill(need, routine.now), IsthmusError):
                await self._wait(worker, need, began_at, routine)
            num_tokens = len(need.request.prompt_token_ids)
            worker.num_tokens_ahead += num_tokens
            return PrefillPlace(worker, num_tokens, num_tokens, on_end=self._pool.note_change)

    async def decode(self, need: Need, source: Source, routine: Routine) -> DecodePlace:
        """In turn: blocks set aside. Raises what the last worker asked refused it with, or as `prefill` does."""
        began_at = routine.now
        reserving = self._admission.reserving
        # Somebody waits for blocks: who comes now stands in line behind.
        place = await self._ask_each(need, source, routine, ANSWER_TIMEOUT_S) if reserving.num_free else None
        if isinstance(place, DecodePlace):
            return place
        with reserving.enter(need.order, routine.wake) as turn:
            await turn.comes(routine, need.queue_deadline)
            while isinstance(place := await self._ask_each(need, source, routine, ANSWER_TIMEOUT_S), IsthmusError):
                await self._wait(place, need, began_at, routine)
            return place

    async def decode_at_once(self, need: Need, source: Source, routine: Routine) -> DecodePlace | IsthmusError:
        """A place at a decode worker that has room now; nobody waits."""
        try:
            return await self._ask_each(need, source, routine, MOVE_ANSWER_S)
        except (InvalidRequest, StaleOwner) as refusal:
            return refusal

    def remember(self, need: Need, prefill: PrefillPlace, decode: DecodePlace) -> None:
        """The prompt's prefixes are where it was placed, for the requests that come after."""
        incarnations = (prefill.worker.record.incarnation, decode.worker.record.incarnation)
        self._affinity.remember(need.prefixes, incarnations)

    def _choose_prefill(self, need: Need, now: float) -> PrefillWorker | IsthmusError:
        usable = self._pool.usable_prefill(now)
        workers = {worker.record.incarnation: worker for worker in usable if worker.numerics == need.numerics}
        if not workers:
            return _none_left("prefill", has_others=bool(usable))
        views = [w.view(self._affinity.num_prefix_tokens(need.prefixes, key)) for key, w in workers.items()]
        chosen = policy.choose_prefill(views, avoid=need.avoid, holds_blocks=need.holds_blocks)
        return workers[chosen] if chosen else Overloaded("all prefill workers are busy")

    async def _ask_each(
        self, need: Need, source: Source, routine: Routine, timeout_s: float
    ) -> DecodePlace | IsthmusError:
        """Asks decode workers in order of preference; the last refusal when none has room now."""
        usable = self._pool.usable_decode(routine.now)
        workers = {worker.record.incarnation: worker for worker in usable if worker.numerics == need.numerics}
        if not workers:
            return _none_left("decode", has_others=bool(usable))
        views = [w.view(self._affinity.num_prefix_tokens(need.prefixes, key)) for key, w in workers.items()]
        ranked = policy.rank_decode(views, need.num_positions, avoid=need.avoid)
        if not ranked:
            raise _too_large(need, views)
        no_room: IsthmusError | None = None
        stale: StaleOwner | None = None
        for incarnation in ranked:
            answer = await self._ask_one(need, workers[incarnation], source, routine, timeout_s)
            if isinstance(answer, DecodePlace):
                return answer
            self._note_refused(need, workers[incarnation], answer)
            no_room = answer if isinstance(answer, Overloaded) else no_room
            stale = answer if isinstance(answer, StaleOwner) else stale
        if stale is not None and no_room is None:  # waiting in line would not help, and hold up the others
            raise stale
        return no_room or _unavailable("decode")

    async def _ask_one(
        self, need: Need, worker: DecodeWorker, source: Source, routine: Routine, timeout_s: float
    ) -> DecodePlace | IsthmusError:
        """Raises InvalidRequest, which every worker would answer; returns any other refusal."""
        num_blocks = worker.record.layout.num_blocks(need.num_positions)
        remaining_s = need.deadline - routine.now
        worker.reserved_blocks += num_blocks  # from now on, so that the next request already counts it
        try:
            stream = worker.session.reserve(_reserve(need, worker, remaining_s), source, routine.now)
        except WorkersUnavailable as refusal:
            worker.reserved_blocks -= num_blocks
            return refusal
        place = DecodePlace(worker, stream, num_blocks)
        try:
            until = routine.now + min(remaining_s, timeout_s, ANSWER_TIMEOUT_S)
            refusal = await stream.refusal(routine, until)
        except BaseException:  # interrupted: nobody would free what the worker may have set aside
            place.give_up()
            raise
        if refusal is None:
            return place
        place.give_up()
        if isinstance(refusal, InvalidRequest):
            raise refusal
        return refusal

    def _note_refused(self, need: Need, worker: DecodeWorker, refusal: IsthmusError) -> None:
        self._pool.ledger.record(
            "placement.refused",
            request_id=need.request.request_id,
            cause=refusal.reason,
            worker=worker.record.name,
            detail=refusal.detail,
        )

    async def _wait(self, refusal: IsthmusError, need: Need, began_at: float, routine: Routine) -> None:
        """A moment, or until something changed; raises `refusal` after waiting long enough since `began_at`.

        For room that is as long as the queue allows; for a worker to exist only a moment, but for a recovery as long.
        """
        is_gone = not isinstance(refusal, Overloaded) and not need.is_patient
        until = min(need.queue_deadline, began_at + GONE_WAIT_S) if is_gone else need.queue_deadline
        await self._wait_until(until, refusal, routine)

    async def _wait_until(self, until: float, refusal: IsthmusError, routine: Routine) -> None:
        if routine.now >= until:
            refusal.retry_after_s = refusal.retry_after_s or RETRY_AFTER_S
            raise refusal
        await self._pool.change(routine, min(until, routine.now + RETRY_INTERVAL_S))


def _reserve(need: Need, worker: DecodeWorker, remaining_s: float) -> decode_pb2.Reserve:
    retains = need.retention_s > 0
    return decode_pb2.Reserve(
        request=request_to_proto(replace(need.request, timeout_s=remaining_s)),
        attach=worker.session.attach_id(need.counter),
        on_disconnect=types_pb2.ON_DISCONNECT_RETAIN if retains else types_pb2.ON_DISCONNECT_ABORT,
        retention_s=need.retention_s,
        moves=need.moves,
    )


def _too_large(need: Need, views: Sequence[policy.DecodeView]) -> InvalidRequest:
    most = max(view.total_blocks * view.block_size for view in views)
    given = f"{need.num_positions} positions of prompt and max_tokens"
    return InvalidRequest.of("sampling.max_tokens", given, f"at most {most}, the largest decode worker's cache")


def _none_left(role: str, *, has_others: bool) -> IsthmusError:
    if has_others:
        return NumericsMismatch(f"the {role} workers left are not of the request's numerics class")
    return _unavailable(role)


def _unavailable(missing: str) -> WorkersUnavailable:
    return WorkersUnavailable(f"no {missing} worker of the needed kind is available", retry_after_s=RETRY_AFTER_S)
