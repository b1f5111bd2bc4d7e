"""What follows a failure: another prefill worker for what is missing, another attempt elsewhere, or the end."""

from collections.abc import Callable
from dataclasses import replace

from isthmus.errors import (
    AttachedElsewhere,
    Draining,
    IsthmusError,
    Overloaded,
    StaleOwner,
    TransferIncomplete,
    WorkerLost,
    WorkersUnavailable,
)
from isthmus.v1 import decode_pb2
from router.life.attempt import Attempt
from router.life.locate import Locator
from router.life.losses import AttemptFailed, Losses
from router.life.parts import AttemptContext, ClaimedAttempt
from router.pool.admission import Admission, Turn
from router.pool.decode_stream import Inbox, Source
from router.pool.policy import Need
from router.pool.session import ANSWER_TIMEOUT_S

FILL_TIMEOUT_S = 10.0  # of a rearmed transfer; the decode worker's own bound holds too
# What another worker may do better; anything else would fail there too.
_RETRYABLE = (WorkerLost, WorkersUnavailable, Draining, Overloaded, StaleOwner, TransferIncomplete)


class Recovery:
    """Of one request, from its first failure on. Written by the request's routine."""

    def __init__(
        self, context: AttemptContext, admission: Admission, locator: Locator, make_inbox: Callable[[], Inbox]
    ):
        self._context = context
        self._admission = admission
        self._locator = locator
        self._make_inbox = make_inbox
        self._losses = Losses()
        self._avoid: set[str] = set()  # workers that failed this request
        self._lost_at: float | None = None  # a worker was lost, and decode has not spoken since
        self._alone: Turn | None = None  # held while a suspect gets its next token
        self._num_tokens_before = 0  # when it was taken
        context.recovery = self

    async def mend(self, attempt: Attempt, failed: AttemptFailed) -> None:
        """Goes on with the attempt as long as only prefill workers fail. Raises AttemptFailed when decode is lost."""
        try:
            while True:
                await attempt.flush()  # what came before the failure is good
                if failed.role == "decode" or attempt.prefill is None:
                    raise failed
                await self._refill(attempt, failed)
                try:
                    await attempt.run()
                except AttemptFailed as again:
                    failed = again
                else:
                    return
        finally:
            self.leave_quarantine()  # however the attempt ends

    async def try_again(self, need: Need, failed: AttemptFailed, has_left: Callable[[], bool]) -> None:
        """Attempt after attempt: each replays what the client has and computes the same tokens from there.

        Raises what ends the request.
        """
        while True:
            self.judge(failed)
            request_id = need.request.request_id
            if has_left() and await self._locator.has(request_id, self._context.routine):
                raise AttachedElsewhere("its client has gone on with another copy") from failed
            need = self.next_need(need)
            try:
                await self._try_once(need)
            except AttemptFailed as again:
                failed = again
            else:
                return

    async def _try_once(self, need: Need) -> None:
        opened = self._context.opened
        opened.num_attempts += 1
        opened.counter += 1
        try:
            await self.isolate(need)
            with Attempt(self._context, replace(need, counter=opened.counter), Source(self._make_inbox())) as attempt:
                await attempt.place()
                try:
                    await attempt.run()
                except AttemptFailed as failed:
                    await self.mend(attempt, failed)
        finally:
            self.leave_quarantine()

    def next_need(self, need: Need) -> Need:
        """For another attempt: what the client has is replayed, prefill workers that failed are avoided.

        A decode worker that failed has no session any more, which keeps it from being chosen.
        """
        request = replace(need.request, emitted_token_ids=tuple(self._context.opened.delivery.token_ids))
        return replace(need, request=request, avoid=frozenset(self._avoid)).with_patience(self._context.routine.now)

    def judge(self, failed: AttemptFailed) -> None:
        """Returns when it is worth trying again; raises what ends the request."""
        error = failed.error
        num_tokens = self._context.opened.delivery.num_tokens
        if self._lost_at is None:
            self._lost_at = self._context.routine.now
        self._context.record("attempt.failed", cause=error.reason, failed=failed.role, detail=error.detail)
        if not isinstance(error, _RETRYABLE):
            raise error from failed
        if not isinstance(error, WorkerLost):
            self._losses.note_failure(error, num_tokens)
        elif failed.was_computing:
            self._losses.note_worker_lost(failed.role, num_tokens, has_others=failed.has_others)

    async def _refill(self, attempt: Attempt, failed: AttemptFailed) -> None:
        """A prefill worker failed, decode has the reservation still: another one brings what is missing.

        Raises AttemptFailed when decode is lost too, or what ends the request.
        """
        self._suspect_prefill(attempt)
        self.judge(failed)
        await self.isolate(attempt.need)
        rearmed = await self._rearm(attempt)
        if rearmed is None:  # decode has everything and has spoken, or will at once
            attempt.release_prefill()
            return
        context = self._context
        need = replace(attempt.need, avoid=frozenset(self._avoid), holds_blocks=True)
        place = await context.parts.placement.prefill(need.with_patience(context.routine.now), context.routine)
        attempt.take_prefill(place, list(rearmed.missing))

    async def isolate(self, need: Need) -> None:
        """A suspect gets its next token while no other suspect is computed."""
        if not self._losses.is_suspect or self._alone is not None:
            return
        routine = self._context.routine
        self._num_tokens_before = self._context.opened.delivery.num_tokens
        self._alone = self._admission.quarantine.enter(need.order, routine.wake)
        await self._alone.comes(routine, need.queue_deadline)

    def progressed(self, attempt: ClaimedAttempt) -> None:
        """Something came, perhaps a token, perhaps decode's first word."""
        if self._alone is not None and self._context.opened.delivery.num_tokens > self._num_tokens_before:
            self.leave_quarantine()
        if self._lost_at is not None and attempt.has_claim:
            ms = round(1000 * (self._context.routine.now - self._lost_at), 1)
            self._context.record("request.recovered", ms=ms)
            self._lost_at = None

    def leave_quarantine(self) -> None:
        """At a token, and at the end of an attempt."""
        if self._alone is not None:
            self._alone.leave()
            self._alone = None

    async def _rearm(self, attempt: Attempt) -> decode_pb2.Rearmed | None:
        """Has the lost prefill worker's frames refused. None when decode has everything already."""
        attempt.transfer_attempt += 1
        self._context.opened.num_attempts += 1
        answer = await self._ask_to_rearm(attempt)
        if isinstance(answer, StaleOwner):
            return None
        if isinstance(answer, WorkerLost | WorkersUnavailable):
            raise AttemptFailed("decode", answer, was_computing=False) from answer
        if isinstance(answer, IsthmusError):
            raise answer
        num_missing = sum(extent.num_tokens for extent in answer.missing)
        self._context.record("request.rearmed", transfer_attempt=attempt.transfer_attempt, num_missing_rows=num_missing)
        return answer

    async def _ask_to_rearm(self, attempt: Attempt) -> decode_pb2.Rearmed | IsthmusError:
        stream = attempt.stream_place.stream
        routine = self._context.routine
        stream.session.rearm(stream, attempt.transfer_attempt, FILL_TIMEOUT_S, routine.now)
        asked = stream.rearmed
        assert asked is not None, "asked just now"
        try:
            if await routine.wait_for(lambda: asked.has_come, routine.now + ANSWER_TIMEOUT_S):
                return asked.value
            return WorkerLost("the decode worker did not answer a rearm in time")
        finally:
            stream.stop_asking()

    def _suspect_prefill(self, attempt: Attempt) -> None:
        """The next attempt, and for a moment other requests, go elsewhere if there is an elsewhere."""
        assert attempt.prefill is not None, "a prefill worker failed"
        self._avoid.add(attempt.prefill.worker.record.incarnation)
        attempt.prefill.worker.suspect(self._context.routine.now)
