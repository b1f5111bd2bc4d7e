"""One request's life: admit, accept, place, try until it is done, finish. What it holds ends with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from isthmus.clock import Clock
from isthmus.errors import AttachedElsewhere, IsthmusError, SlowClient
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.v1 import inference_pb2
from router.admission import Admission, Order
from router.affinity import prompt_prefixes
from router.attempt import Attempt, AttemptFailed
from router.call import Call
from router.drive import Drive, Shared
from router.inbox import MAX_BUFFERED_TOKENS, Inbox, Source
from router.interrupt import Interruptible
from router.locate import Locator
from router.losses import Losses
from router.placement import Ask, DecodePlace, Job, Placement
from router.policy import NumericsClass


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    router_name: str
    queue_timeout_s: float
    failpoints: Failpoints = field(default_factory=Failpoints)
    max_buffered_tokens: int = MAX_BUFFERED_TOKENS


class Dispatch:
    """Stateless between requests; pool, admission and placement hold what requests share."""

    def __init__(
        self,
        placement: Placement,
        admission: Admission,
        locator: Locator,
        settings: DispatchSettings,
        *,
        clock: Clock,
        ledger: Ledger,
    ):
        self._locator = locator
        self._admission = admission
        self._settings = settings
        self._clock = clock
        self._ledger = ledger
        self._placement = placement
        self._shared = Shared(placement, clock, ledger, settings.failpoints, settings.router_name)

    async def serve(self, call: Call) -> None:
        """Streams `accepted`, tokens and `finished`. Raises what ended the request instead of `finished`."""
        async with self._admitted(call) as order:
            queue_deadline = self._queue_deadline(call)
            if call.delivery.finish_reason is None:
                job = self._job(call, order, await self._placement.numerics_class(queue_deadline), queue_deadline)
                await call.write(call.accepted(job.numerics))
                call.record(self._ledger, "request.accepted", num_prompt_tokens=len(call.request.prompt_token_ids))
                await self._attempts(call, job)
            else:  # all its tokens were emitted before: only the end was missing
                await call.write(call.accepted(NumericsClass("", "", "")))

    async def resume(self, call: Call, place: DecodePlace) -> None:
        """Goes on with a stream that was attached; like `serve` from there."""
        async with self._admitted(call) as order:
            job = self._job(call, order, place.worker.numerics, self._queue_deadline(call))
            await call.write(call.accepted(job.numerics))
            call.record(self._ledger, "request.resumed", index=call.delivery.num_tokens)
            await self._attempts(call, job, place)

    def source(self, life: Interruptible) -> Source:
        """A decode worker's way to a request, which ends when its client does not read."""
        too_slow = SlowClient("the client does not read its tokens; its buffer is full")
        inbox = Inbox(self._clock.now, partial(life.interrupt, too_slow), max_tokens=self._settings.max_buffered_tokens)
        return Source(inbox)

    def finished(self, call: Call) -> inference_pb2.GenerateResponse:
        """The last message; of a request ended by a Cancel call too."""
        message = call.finished(self._clock.now())
        cause = call.delivery.finish_reason.value if call.delivery.finish_reason else "cancelled"
        call.record(self._ledger, "request.finished", cause=cause, num_tokens=call.delivery.num_tokens)
        return message

    @asynccontextmanager
    async def _admitted(self, call: Call) -> AsyncIterator[Order]:
        """Holds a slot; the ledger tells how the request ended, and so does the client's last message."""
        order, came_at = self._admission.order(call.request.priority), self._clock.now()
        async with self._admission.slot(order, self._queue_deadline(call) - self._clock.now()):
            call.record(self._ledger, "request.queued", ms=round(1000 * (self._clock.now() - came_at), 1))
            try:
                yield order
                self._settings.failpoints.hit("router.before_finished")
                await call.write(self.finished(call))
            except BaseException as error:  # the client gone included
                cause = error.reason if isinstance(error, IsthmusError) else type(error).__name__
                call.record(self._ledger, "request.failed", cause=cause)
                raise

    def _job(self, call: Call, order: Order, numerics: NumericsClass, queue_deadline: float) -> Job:
        return Job(
            request=replace(call.remaining_request, numerics_digest=numerics.numerics_digest),
            numerics=numerics,
            order=order,
            prefixes=prompt_prefixes(call.request.prompt_token_ids, call.request.tenant),
            queue_deadline=queue_deadline,
            deadline=call.deadline,
            retention_s=call.retention_s,
        )

    async def _attempts(self, call: Call, job: Job, attached: DecodePlace | None = None) -> None:
        """Another attempt replays what the client has and computes the same tokens from there."""
        losses, avoid = Losses(), set[str]()
        while True:
            call.num_attempts += 1
            drive = self._drive(call, job, losses, avoid, attached)
            try:
                await (drive.begin() if attached is None else drive.go_on(attached))
            except AttemptFailed as failed:
                await drive.judge(failed)
                if not call.is_attended and await self._locator.has(call.request.request_id):
                    raise AttachedElsewhere("its client has gone on with another copy") from failed
            else:
                return
            attached = None
            request = replace(call.remaining_request, numerics_digest=job.numerics.numerics_digest)
            job = replace(job, request=request).with_patience(self._clock.now())

    def _drive(self, call: Call, job: Job, losses: Losses, avoid: set[str], attached: DecodePlace | None) -> Drive:
        source = attached.stream.source if attached else self.source(call.life)
        attempt = Attempt(source, call.delivery, call.timeline, is_attached=attached is not None)
        call.counter += attached is None
        ask = Ask(job, call.counter, attempt.decode, frozenset(avoid), is_patient=call.num_attempts > 1)
        return Drive(self._shared, call, ask, attempt, losses, avoid)

    def _queue_deadline(self, call: Call) -> float:
        return min(call.deadline, self._clock.now() + self._settings.queue_timeout_s)
