"""One request's life: admit, accept, place, prefill, merge both sources, finish. What it holds ends with it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial

from isthmus.clock import Clock
from isthmus.convert import finish_reason_to_proto, request_to_proto
from isthmus.errors import (
    Draining,
    IsthmusError,
    Overloaded,
    SlowClient,
    StaleOwner,
    TransferIncomplete,
    WorkerLost,
    WorkersUnavailable,
)
from isthmus.ledger import Ledger
from isthmus.types import FinishReason, Request
from isthmus.v1 import inference_pb2, prefill_pb2
from router.admission import Admission, Order
from router.affinity import prompt_prefixes
from router.attempt import Attempt, AttemptFailed
from router.delivery import Delivery, Timeline
from router.inbox import MAX_BUFFERED_TOKENS, Failed, Inbox
from router.interrupt import Interruptible
from router.placement import Ask, Job, Placed, Placement
from router.prefill_call import prefilling
from router.workers import SUSPECT_S

MAX_ATTEMPTS = 2
# What another worker may do better; anything else would fail there too.
_RETRYABLE = (WorkerLost, WorkersUnavailable, Draining, Overloaded, StaleOwner, TransferIncomplete)

Write = Callable[[inference_pb2.GenerateResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    router_name: str
    queue_timeout_s: float
    max_buffered_tokens: int = MAX_BUFFERED_TOKENS


@dataclass(eq=False, slots=True)
class Call:
    """One Generate call: the request, its client and what has happened to it. Owned by the call's task."""

    request: Request
    client_request_id: str
    delivery: Delivery
    timeline: Timeline
    life: Interruptible
    deadline: float
    write: Write
    num_attempts: int = 0
    num_cached_tokens: int = 0
    served_by: inference_pb2.ServedBy = field(default_factory=inference_pb2.ServedBy)


class Dispatch:
    """Stateless between requests; pool, admission and placement hold what requests share."""

    def __init__(
        self, placement: Placement, admission: Admission, settings: DispatchSettings, *, clock: Clock, ledger: Ledger
    ):
        self._placement = placement
        self._admission = admission
        self._settings = settings
        self._clock = clock
        self._ledger = ledger

    async def serve(self, call: Call) -> None:
        """Streams `accepted`, tokens and `finished`. Raises what ended the request instead of `finished`."""
        order = self._admission.order(call.request.priority)
        queue_deadline = self._queue_deadline(call.deadline)
        async with self._admission.slot(order, queue_deadline - self._clock.now()):
            try:
                job = await self._job(call, order, queue_deadline)
                await call.write(_accepted(call, job))
                self._record(call, "request.accepted", num_prompt_tokens=len(job.request.prompt_token_ids))
                await self._attempts(call, job)
                await call.write(self.finished(call))
            except BaseException as error:  # the client gone included: the ledger tells how every request ended
                cause = error.reason if isinstance(error, IsthmusError) else type(error).__name__
                self._record(call, "request.failed", cause=cause)
                raise

    def finished(self, call: Call) -> inference_pb2.GenerateResponse:
        """The last message; of a request ended by a Cancel call too."""
        delivery = call.delivery
        reason = delivery.finish_reason or FinishReason.CANCELLED
        if delivery.num_tokens <= 1:
            call.served_by.decode = ""  # prefill alone served it
        self._record(call, "request.finished", cause=reason.value, num_tokens=delivery.num_tokens)
        finished = inference_pb2.Finished(
            finish_reason=finish_reason_to_proto(reason),
            usage=inference_pb2.Usage(
                num_prompt_tokens=len(call.request.prompt_token_ids),
                num_cached_tokens=call.num_cached_tokens,
                num_generated_tokens=delivery.num_tokens,
            ),
            timings=call.timeline.timings(delivery.arrived_at, self._clock.now()),
            workers=call.served_by,
            num_attempts=call.num_attempts,
            text=delivery.held_text(),
        )
        return inference_pb2.GenerateResponse(finished=finished)

    async def _job(self, call: Call, order: Order, queue_deadline: float) -> Job:
        numerics = await self._placement.numerics_class(queue_deadline)
        request = replace(call.request, numerics_digest=numerics.numerics_digest)
        prefixes = prompt_prefixes(request.prompt_token_ids, request.tenant)
        return Job(request, numerics, order, prefixes, queue_deadline=queue_deadline, deadline=call.deadline)

    async def _attempts(self, call: Call, job: Job) -> None:
        """A second attempt computes the same tokens again and the merge drops what the client has already."""
        avoid: set[str] = set()
        while True:
            call.num_attempts += 1
            try:
                await self._attempt(call, job, avoid)
            except AttemptFailed as failed:
                self._record(call, "attempt.failed", cause=failed.cause.error.reason, failed=failed.cause.source)
                # With more than token 0 delivered this would be a recovery that replays, not a repetition.
                is_worth_it = isinstance(failed.cause.error, _RETRYABLE) and call.delivery.num_tokens <= 1
                if call.num_attempts >= MAX_ATTEMPTS or not is_worth_it:
                    await self._flush(call)  # what came before the failure is good
                    raise failed.cause.error from failed
                job = replace(job, queue_deadline=self._queue_deadline(job.deadline))
            else:
                return

    async def _attempt(self, call: Call, job: Job, avoid: set[str]) -> None:
        too_slow = SlowClient("the client does not read its tokens; its buffer is full")
        give_up = partial(call.life.interrupt, too_slow)
        inbox = Inbox(self._clock.now, give_up, max_tokens=self._settings.max_buffered_tokens)
        ask = Ask(job, call.num_attempts, inbox, frozenset(avoid))
        async with self._placement.place(ask) as placed:
            self._note_placed(call, placed)
            request = _prefill_request(job, placed, job.deadline - self._clock.now())
            async with prefilling(placed.prefill, request, inbox, timeout_s=job.deadline - self._clock.now()):
                attempt = Attempt(inbox, call.delivery, call.timeline)
                try:
                    await self._follow(call, attempt, placed)
                except AttemptFailed as failed:
                    self._blame(failed.cause, placed, avoid)
                    placed.decode.stream.end(FinishReason.ERROR)
                    await placed.decode.stream.settle()  # the next attempt may ask the same worker
                    raise
                await attempt.wait_for_done()

    async def _follow(self, call: Call, attempt: Attempt, placed: Placed) -> None:
        """Passes tokens on as they come, several in one message when the client is slower than they are."""
        delivery, stream = call.delivery, placed.decode.stream
        while delivery.finish_reason is None:
            await attempt.advance()
            call.num_cached_tokens = attempt.num_cached_tokens
            if delivery.finish_reason is not None:
                if attempt.needs_no_decode or (delivery.num_tokens > 1 and not delivery.is_cut_by_text):
                    stream.let_end()
                else:
                    stream.end(delivery.finish_reason)
            await self._flush(call)

    async def _flush(self, call: Call) -> None:
        if chunk := call.delivery.take_chunk():
            await call.write(inference_pb2.GenerateResponse(tokens=chunk))
            if call.timeline.first_sent_at is None:
                call.timeline.first_sent_at = self._clock.now()

    def _note_placed(self, call: Call, placed: Placed) -> None:
        prefill, decode = placed.prefill.worker.record, placed.decode.worker.record
        if call.timeline.placed_at is None:
            call.timeline.placed_at = self._clock.now()
        names = inference_pb2.ServedBy(router=self._settings.router_name, prefill=prefill.name, decode=decode.name)
        call.served_by.CopyFrom(names)
        transfer_id = placed.decode.stream.reserved.transfer_id
        self._record(
            call, "request.placed", transfer_id=transfer_id, prefill=prefill.incarnation, decode=decode.incarnation
        )

    def _blame(self, failed: Failed, placed: Placed, avoid: set[str]) -> None:
        """The next attempt, and for a moment other requests, go elsewhere if there is an elsewhere."""
        if failed.source == "prefill":
            avoid.add(placed.prefill.worker.record.incarnation)
            if isinstance(failed.error, WorkerLost):
                placed.prefill.worker.suspect_until = self._clock.now() + SUSPECT_S
        elif failed.source == "decode":
            avoid.add(placed.decode.worker.record.incarnation)

    def _queue_deadline(self, deadline: float) -> float:
        return min(deadline, self._clock.now() + self._settings.queue_timeout_s)

    def _record(self, call: Call, event: str, *, cause: str = "", transfer_id: str = "", **fields: object) -> None:
        self._ledger.record(
            event,
            request_id=call.request.request_id,
            transfer_id=transfer_id,
            attempt=call.num_attempts,
            cause=cause,
            **fields,
        )


def _accepted(call: Call, job: Job) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        accepted=inference_pb2.Accepted(
            request_id=job.request.request_id,
            client_request_id=call.client_request_id,
            seed=job.request.seed,
            model_digest=job.numerics.model_digest,
            numerics_digest=job.numerics.numerics_digest,
            num_prompt_tokens=len(job.request.prompt_token_ids),
        )
    )


def _prefill_request(job: Job, placed: Placed, remaining_s: float) -> prefill_pb2.PrefillRequest:
    """The target is the decode worker's own word, passed on unread."""
    reserved = placed.decode.stream.reserved
    target = prefill_pb2.TransferTarget(
        transfer_id=reserved.transfer_id,
        attempt=reserved.attempt,
        zmq_endpoint=reserved.zmq_endpoint,
        receiver_incarnation=reserved.incarnation,
        layout_fingerprint=reserved.layout_fingerprint,
        missing=reserved.missing,
    )
    request = request_to_proto(replace(job.request, timeout_s=max(remaining_s, 0.001)))
    return prefill_pb2.PrefillRequest(request=request, target=target)
