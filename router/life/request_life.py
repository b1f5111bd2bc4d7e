"""One request's life: admit, accept, place, try until it is done, finish. What it holds ends with it.

    queued --slot--> accepted --attempts, one after another--> finished
       +--------------------+---- refused, cancelled, deadline, failed, client gone ----> ended

A core: each life is one routine. Its caller (gRPC, later HTTP too) is a port, told one message after another.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial

from isthmus.errors import (
    AttachedElsewhere,
    DeadlinePassed,
    Draining,
    IsthmusError,
    Overloaded,
    RequestCancelled,
    SlowClient,
    reason_of,
)
from isthmus.kv.prefix import prefix_hashes, prefix_scope
from isthmus.process.loop_driver import Drive, Driver
from isthmus.routine import Interrupted, Routine
from isthmus.types import FinishReason
from isthmus.v1 import inference_pb2
from router.client.caller import Caller, ClientGone, ResumeWish
from router.client.opened_request import OpenedRequest, RequestOpener
from router.life.attempt import Attempt
from router.life.locate import Locator, StreamCancel
from router.life.losses import AttemptFailed
from router.life.parts import AttemptContext, LifeParts
from router.life.recovery import Recovery
from router.pool.admission import Admission, Order
from router.pool.decode_stream import Inbox, Source
from router.pool.placement import DecodePlace
from router.pool.policy import STRIDE_TOKENS, Need, NumericsClass


@dataclass(eq=False, slots=True)
class Lives:
    """All request lives of a router. Written by itself: lives are begun here and end by themselves."""

    parts: LifeParts
    admission: Admission
    locator: Locator
    opener: RequestOpener
    drive: Drive
    on_end: Callable[[OpenedRequest | None, BaseException | None], None]  # a request, if it was opened, and its error
    _by_request: dict[str, "RequestLife"] = field(default_factory=dict[str, "RequestLife"], init=False)

    def __len__(self) -> int:
        return len(self._by_request)

    def begin(self, opened: OpenedRequest, caller: Caller) -> "RequestLife":
        """A new request."""
        life = RequestLife(self, caller)
        life.begin(opened)
        return life

    def resume(self, wish: ResumeWish, caller: Caller) -> "RequestLife":
        """Goes on with a stream that some decode worker has."""
        life = RequestLife(self, caller)
        life.resume(wish)
        return life

    def cancel(self, request_id: str, on_answer: Callable[[bool], None]) -> None:
        """Ends a request of this router, or a stream of any; whether anybody had it."""
        if (life := self._by_request.get(request_id)) is not None:
            life.interrupt(RequestCancelled("cancelled by a Cancel call"))
            on_answer(True)  # noqa: FBT003 - what a future takes
        else:
            StreamCancel(self.locator, self.drive).begin(request_id, on_answer)

    def hand_on(self) -> int:
        """The router drains: streams that decode keeps go on there until another router resumes them. How many stay."""
        for life in list(self._by_request.values()):
            life.hand_on(Draining("this router drains; resume at another", retry_after_s=0.05))
        return len(self)

    def note_opened(self, request_id: str, life: "RequestLife") -> None:
        """The life has its request; another life of that request gives way."""
        if (before := self._by_request.get(request_id)) is not None:
            before.interrupt(AttachedElsewhere("another call took the stream over"))
        self._by_request[request_id] = life

    def note_ended(self, request_id: str, life: "RequestLife") -> None:
        if self._by_request.get(request_id) is life:  # else resumed here by another call
            del self._by_request[request_id]


class RequestLife:
    """Written by its own routine, and by its caller through `told`, `left`, `cancel` and `hand_on`."""

    def __init__(self, lives: Lives, caller: Caller):
        self._lives = lives
        self._caller = caller
        self._driver: Driver = lives.drive(self.turn)
        self._routine = Routine(self._driver.ready)
        self._opened: OpenedRequest | None = None
        self._is_telling = False
        self._is_known = False  # the client knows the request's id: it can come back for it
        self._has_left = False
        self.is_over = False

    def begin(self, opened: OpenedRequest) -> None:
        self._routine.interrupt(DeadlinePassed("the request's deadline has passed"), at=opened.deadline)
        self._routine.begin(self._serve(opened))

    def resume(self, wish: ResumeWish) -> None:
        self._is_known = True
        self._routine.begin(self._resume(wish))

    def turn(self, now: float) -> float | None:
        """Goes on until it waits; when it is over its caller hears so."""
        try:
            at = self._routine.turn(now)
        except Interrupted as interrupted:
            self._end(interrupted.cause)
        except Exception as error:  # noqa: BLE001 - the routine's root: its caller is told
            self._end(error)
        else:
            if not self._routine.is_over:
                return at
            self._end(None)
        return None

    def told(self) -> None:
        """The caller has passed the message on."""
        self._is_telling = False
        self._is_known = True
        self._routine.wake()

    def left(self, now: float) -> None:
        """The client is gone. A request that is kept lasts for its retention, any other ends."""
        if self._has_left or self.is_over:
            return
        self._has_left = True
        retention_s = self._opened.retention_s if self._opened is not None and self._is_known else 0
        if retention_s:
            unread = RequestCancelled("nobody resumed the request within its retention")
            self._routine.interrupt(unread, at=now + retention_s)
            self._routine.wake()
        else:
            self._routine.interrupt(ClientGone())

    def interrupt(self, cause: IsthmusError) -> None:
        """Ends the life with this error, soon."""
        self._routine.interrupt(cause)

    def hand_on(self, why: IsthmusError) -> None:
        """Ends the call, and leaves the stream with its decode worker if that keeps it for whoever resumes it."""
        stream = self._opened.stream if self._opened is not None and self._opened.retention_s else None
        if stream is not None and stream.is_claimed:
            stream.let_go()
            self.interrupt(why)

    async def _serve(self, opened: OpenedRequest) -> None:
        """Tells `accepted`, tokens and `finished`. Raises what ended the request instead of `finished`."""

        async def work(order: Order) -> None:
            if opened.delivery.finish_reason is not None:  # it was emitted whole: only the end was missing
                await self._tell(opened.accepted(NumericsClass("", "", "")))
                return
            queue_deadline = self._queue_deadline(opened)
            numerics = await self._lives.parts.placement.numerics_class(queue_deadline, self._routine)
            need = self._need(opened, order, numerics, queue_deadline)
            await self._tell(opened.accepted(numerics))
            opened.record(
                self._lives.parts.ledger, "request.accepted", num_prompt_tokens=len(opened.request.prompt_token_ids)
            )
            await self._attempts(opened, need, None)

        await self._with_slot(opened, work)

    async def _resume(self, wish: ResumeWish) -> None:
        """Goes on with a stream that is attached here; like `_serve` from there."""
        received_at = self._routine.now
        passed = DeadlinePassed("the request's deadline has passed")
        self._routine.interrupt(passed, at=received_at + wish.timeout_s)
        place = await self._lives.locator.attach(wish.request_id, wish.next_index, Source(self._inbox()), self._routine)
        with place:
            attached = place.stream.attached
            opened = self._lives.opener.reopen(attached, wish.next_index, received_at, wish.timeout_s)

            async def work(order: Order) -> None:
                need = self._need(opened, order, place.worker.numerics, self._queue_deadline(opened))
                await self._tell(opened.accepted(place.worker.numerics))
                opened.record(self._lives.parts.ledger, "request.resumed", index=opened.delivery.num_tokens)
                await self._attempts(opened, need, place)

            try:
                await self._with_slot(opened, work)
            except Overloaded:  # it got no slot: the stream stays where it is, for another try
                place.stream.let_go()
                raise

    async def _with_slot(self, opened: OpenedRequest, work: Callable[[Order], Awaitable[None]]) -> None:
        """Runs `work` in a slot, then tells the end; of a request ended by a Cancel call too."""
        self._opened = opened
        self._lives.note_opened(opened.request.request_id, self)
        try:
            await self._work_in_slot(opened, work)
        except Interrupted as interrupted:
            # Not when a message is still on its way: no other may follow it.
            if not isinstance(interrupted.cause, RequestCancelled) or self._is_telling:
                raise
            await self._tell(self._finished(opened))
            raise

    async def _work_in_slot(self, opened: OpenedRequest, work: Callable[[Order], Awaitable[None]]) -> None:
        """Holds a slot; the ledger tells how the request ended, and so does the client's last message."""
        admission = self._lives.admission
        order = admission.order(opened.request.priority)
        came_at = self._routine.now
        with admission.slot(order, self._routine.wake) as slot:
            await slot.comes(self._routine, self._queue_deadline(opened))
            opened.record(self._lives.parts.ledger, "request.queued", ms=round(1000 * (self._routine.now - came_at), 1))
            try:
                await work(order)
                self._lives.parts.failpoints.hit("router.before_finished")
                await self._tell(self._finished(opened))
            except BaseException as error:  # the client gone included
                cause = error.cause if isinstance(error, Interrupted) else error
                opened.record(self._lives.parts.ledger, "request.failed", cause=reason_of(cause))
                raise

    async def _attempts(self, opened: OpenedRequest, need: Need, attached: DecodePlace | None) -> None:
        """One attempt; what fails of it is mended, or followed by others, in `recovery`."""
        context = AttemptContext(self._lives.parts, self._routine, opened, self._tell)
        recovery = partial(Recovery, context, self._lives.admission, self._lives.locator, self._inbox)
        opened.num_attempts += 1
        opened.counter += attached is None
        source = attached.stream.source if attached is not None else Source(self._inbox())
        try:
            with Attempt(context, replace(need, counter=opened.counter), source) as attempt:
                if attached is None:
                    await attempt.place()
                elif not attempt.take_attached(attached):
                    return
                try:
                    await attempt.run()
                except AttemptFailed as failed:
                    await recovery().mend(attempt, failed)
        except AttemptFailed as failed:
            await (context.recovery or recovery()).try_again(need, failed, lambda: self._has_left)

    async def _tell(self, message: inference_pb2.GenerateResponse) -> None:
        """Returns once the caller has passed it on; at once when the client has left."""
        if not self._has_left:
            self._is_telling = True
            self._caller.tell(message)
            await self._routine.wait_for(lambda: not self._is_telling or self._has_left)

    def _need(self, opened: OpenedRequest, order: Order, numerics: NumericsClass, queue_deadline: float) -> Need:
        scope = prefix_scope(numerics.layout_fingerprint, tenant=opened.request.tenant)
        return Need(
            request=replace(opened.remaining_request, numerics_digest=numerics.numerics_digest),
            numerics=numerics,
            order=order,
            prefixes=prefix_hashes(opened.request.prompt_token_ids, STRIDE_TOKENS, scope),
            queue_deadline=queue_deadline,
            deadline=opened.deadline,
            retention_s=opened.retention_s,
        )

    def _inbox(self) -> Inbox:
        """What decode workers say of this request; the request ends when its client does not read."""
        too_slow = SlowClient("the client does not read its tokens; its buffer is full")
        on_overflow = partial(self._routine.interrupt, too_slow)
        return Inbox(self._routine.wake, on_overflow, max_tokens=self._lives.parts.max_buffered_tokens)

    def _queue_deadline(self, opened: OpenedRequest) -> float:
        return min(opened.deadline, self._routine.now + self._lives.parts.queue_timeout_s)

    def _finished(self, opened: OpenedRequest) -> inference_pb2.GenerateResponse:
        reason = opened.delivery.finish_reason or FinishReason.CANCELLED
        opened.record(
            self._lives.parts.ledger, "request.finished", cause=reason.value, num_tokens=opened.delivery.num_tokens
        )
        return opened.finished(self._routine.now)

    def _end(self, error: BaseException | None) -> None:
        """Once. A request that was cancelled and told so has no error for its client."""
        self.is_over = True
        self._driver.stop()
        if self._opened is not None:
            self._lives.note_ended(self._opened.request.request_id, self)
        self._lives.on_end(self._opened, error)
        is_told = isinstance(error, RequestCancelled) and self._opened is not None and not self._is_telling
        self._caller.end(None if is_told else error)
