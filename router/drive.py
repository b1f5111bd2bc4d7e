"""One attempt at a request: filled, followed to its end; lost prefill workers replaced, leaving decode workers left."""

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace

from isthmus.clock import Clock
from isthmus.convert import request_to_proto
from isthmus.errors import (
    Draining,
    IsthmusError,
    Overloaded,
    StaleOwner,
    TransferIncomplete,
    WorkerLost,
    WorkersUnavailable,
)
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, prefill_pb2, types_pb2
from router.attempt import MOVE_RETRY_S, Attempt, AttemptFailed
from router.call import Call
from router.losses import Losses
from router.placement import Ask, DecodePlace, Placement, PrefillPlace
from router.prefill_call import prefilling
from router.workers import SUSPECT_S

CLAIM_WAIT_S = 0.5  # for decode's first word, when nothing should be missing any more
FILL_TIMEOUT_S = 10.0  # of a rearmed transfer; the decode worker's own bound holds too
# What another worker may do better; anything else would fail there too.
_RETRYABLE = (WorkerLost, WorkersUnavailable, Draining, Overloaded, StaleOwner, TransferIncomplete)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all attempts of a router use."""

    placement: Placement
    clock: Clock
    ledger: Ledger
    failpoints: Failpoints
    router_name: str


@dataclass(eq=False, slots=True)
class Drive:
    """Owned by the request's task. Raises AttemptFailed when decode is lost, what ends the request as itself."""

    shared: Shared
    call: Call
    ask: Ask
    attempt: Attempt
    losses: Losses
    avoid: set[str]
    decode: DecodePlace = field(init=False)  # who has the stream
    _target: DecodePlace | None = field(default=None, init=False)  # who is to have it
    _alone: AsyncExitStack = field(default_factory=AsyncExitStack, init=False)
    _is_alone: bool = field(default=False, init=False)
    _held: AsyncExitStack = field(default_factory=AsyncExitStack, init=False)
    _target_held: AsyncExitStack = field(default_factory=AsyncExitStack, init=False)
    _move_at: float = field(default=0.0, init=False)

    async def begin(self) -> None:
        """From the prompt, tokens that were emitted already included."""
        try:
            async with self._alone:
                await self._isolate()
                await self._begin()
        except StaleOwner as refused:  # an earlier reservation is still held there: the next counter is higher
            raise AttemptFailed("decode", refused, was_computing=False) from refused

    async def _begin(self) -> None:
        async with self.shared.placement.place(self.ask) as placed, self._held, self._target_held:
            self._take_place(placed.decode)
            self._note_placed(placed.prefill)
            self.shared.failpoints.hit("router.placed")
            await self._fill(placed.prefill, placed.decode.stream.reserved.missing)

    async def go_on(self, place: DecodePlace) -> None:
        """With a stream that was attached."""
        async with self.shared.placement.reserved(place), self._held, self._target_held:
            self._take_place(place)
            self.call.served_by.router = self.shared.router_name
            if self.call.delivery.finish_reason is None:
                await self._wait_for_claim()
                await self._follow()
            else:  # the client has every token; the worker keeps them for its retention
                place.stream.let_go()

    async def _wait_for_claim(self) -> None:
        """A claimed stream says so at once; whoever was to fill another one went with its former router."""
        try:
            async with asyncio.timeout(CLAIM_WAIT_S):
                while not self.attempt.has_claim:
                    await self.attempt.advance()
        except TimeoutError as waited:
            unfilled = TransferIncomplete("the stream was attached before its blocks had come")
            raise AttemptFailed("decode", unfilled, was_computing=False) from waited
        await self._pass_on()

    async def _fill(self, prefill: PrefillPlace, missing: Iterable[types_pb2.Extent]) -> None:
        """One prefill worker after the other brings what is missing, until decode needs it no more."""
        source = self.attempt.expect_prefill()
        remaining_s = self.ask.job.deadline - self.shared.clock.now()
        try:
            async with prefilling(prefill, self._prefill_request(missing), source, timeout_s=remaining_s):
                await self._follow()
                await self.attempt.wait_for_done()
                return
        except AttemptFailed as failed:
            if failed.role != "prefill":
                raise
            self._suspect(prefill)
            await self.judge(failed)
            await self._isolate()
        finally:
            prefill.give_back()
        rearmed = await self._rearm()
        if rearmed is None:
            await self._follow()
            return
        job = self.ask.job.with_patience(self.shared.clock.now())
        ask = replace(self.ask, job=job, avoid=frozenset(self.avoid), is_patient=True, holds_blocks=True)
        async with self.shared.placement.prefill_place(ask) as other:
            self._note_placed(other)
            await self._fill(other, rearmed.missing)

    async def _isolate(self) -> None:
        """A suspect gets its next token while no other suspect is computed."""
        if self.losses.is_suspect and not self._is_alone:
            timeout_s = self.ask.job.queue_deadline - self.shared.clock.now()
            turn = self.shared.placement.quarantine.turn(self.ask.job.order, timeout_s)
            await self._alone.enter_async_context(turn)
            self._is_alone = True

    async def _rearm(self) -> decode_pb2.Rearmed | None:
        """Fences the lost prefill worker. None when decode has everything and has spoken."""
        stream = self.decode.stream
        self.attempt.number += 1
        self.call.num_attempts += 1
        try:
            rearmed = await stream.session.rearm(stream, self.attempt.number, FILL_TIMEOUT_S)
        except StaleOwner:
            await self._wait_for_claim()
            return None
        except (WorkerLost, WorkersUnavailable) as lost:
            raise AttemptFailed("decode", lost, was_computing=False) from lost
        num_missing = sum(extent.num_tokens for extent in rearmed.missing)
        self._record("request.rearmed", transfer_attempt=self.attempt.number, num_missing_rows=num_missing)
        return rearmed

    async def _follow(self) -> None:
        """Passes tokens on as they come, several in one message when the client is slower than they are."""
        num_tokens = self.call.delivery.num_tokens
        while self.call.delivery.finish_reason is None:
            await self._advance()
            if self._is_alone and self.call.delivery.num_tokens > num_tokens:
                self._is_alone = False
                await self._alone.aclose()
            await self._pass_on()

    async def _pass_on(self) -> None:
        """To the client, what has come; and to decode, that it was the end."""
        call, now = self.call, self.shared.clock.now
        call.num_cached_tokens = max(call.num_cached_tokens, self.attempt.num_cached_tokens)
        if call.delivery.finish_reason is not None:
            self._end_stream(call.delivery.finish_reason)
        if call.lost_at is not None and self.attempt.has_claim:
            self._record("request.recovered", ms=round(1000 * (now() - call.lost_at), 1))
            call.lost_at = None
        self.shared.failpoints.hit("router.before_token")
        await call.flush(now)

    async def _advance(self) -> None:
        if not self.attempt.is_leaving:
            await self.attempt.advance()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(MOVE_RETRY_S):
                await self.attempt.advance()
        if self._target is not None and self.attempt.decode is self._target.stream.source:
            self._note_moved(self._target)
        elif self.call.delivery.finish_reason is None:
            await self._move()

    def _end_stream(self, reason: FinishReason) -> None:
        delivery, stream = self.call.delivery, self.decode.stream
        if self.attempt.needs_no_decode or (delivery.num_tokens > 1 and not delivery.is_cut_by_text):
            stream.let_go()  # the worker finds the same end by itself
        else:
            stream.end(reason)

    async def _move(self) -> None:
        """Towards another decode worker; the stream goes on where it is until that one speaks."""
        if self._target is not None and self.attempt.move_failure is not None:
            self._record("request.move_failed", cause=self.attempt.move_failure)
            await self._target_held.aclose()
            self._target, self.attempt.target = None, None
        now = self.shared.clock.now()
        if self._target is not None or not self.attempt.has_claim or now < self._move_at:
            return
        self._move_at = now + MOVE_RETRY_S
        self.call.counter += 1
        job = replace(self.ask.job, request=self.call.remaining_request)
        ask = replace(self.ask, job=job, source=self.attempt.expect_target(), counter=self.call.counter, moves=True)
        place = await self.shared.placement.try_decode(ask)
        if isinstance(place, IsthmusError):
            self.attempt.target = None
            return
        self._target = await self._target_held.enter_async_context(self.shared.placement.reserved(place))
        stream = self.decode.stream
        stream.session.send_move(stream, place.stream.reserved)

    def _note_moved(self, place: DecodePlace) -> None:
        before = self.decode
        before.stream.let_go()
        self._take_place(place)
        self._held.push_async_exit(self._target_held.pop_all())
        self._target = None
        names = {"worker": before.worker.record.name, "to": place.worker.record.name}
        self._record("request.moved", transfer_id=place.stream.reserved.transfer_id, **names)

    def _take_place(self, place: DecodePlace) -> None:
        self.decode, self.call.stream = place, place.stream
        self.attempt.is_leaving = place.stream.session.is_leaving
        self.call.served_by.decode = place.worker.record.name

    def _note_placed(self, prefill: PrefillPlace) -> None:
        call, now = self.call, self.shared.clock.now()
        if call.timeline.placed_at is None:
            call.timeline.placed_at = now
        names = {"prefill": prefill.worker.record.name, "decode": self.decode.worker.record.name}
        call.served_by.router, call.served_by.prefill = self.shared.router_name, names["prefill"]
        self._record("request.placed", transfer_id=self.decode.stream.reserved.transfer_id, **names)

    async def judge(self, failed: AttemptFailed) -> None:
        """Returns when it is worth trying again; raises what ends the request."""
        await self.call.flush(self.shared.clock.now)  # what came before the failure is good
        error, num_tokens = failed.error, self.call.delivery.num_tokens
        self.call.lost_at = self.call.lost_at or self.shared.clock.now()
        self._record("attempt.failed", cause=error.reason, failed=failed.role, detail=error.detail)
        if not isinstance(error, _RETRYABLE):
            raise error from failed
        if not isinstance(error, WorkerLost):
            self.losses.note_failure(error, num_tokens)
        elif failed.was_computing:
            self.losses.note_worker_lost(failed.role, num_tokens, in_company=failed.in_company)

    def _suspect(self, prefill: PrefillPlace) -> None:
        """The next attempt, and for a moment other requests, go elsewhere if there is an elsewhere."""
        self.avoid.add(prefill.worker.record.incarnation)
        prefill.worker.suspect_until = self.shared.clock.now() + SUSPECT_S

    def _prefill_request(self, missing: Iterable[types_pb2.Extent]) -> prefill_pb2.PrefillRequest:
        """The target is the decode worker's own word, passed on unread."""
        reserved = self.decode.stream.reserved
        target = prefill_pb2.TransferTarget(
            transfer_id=reserved.transfer_id,
            attempt=self.attempt.number,
            zmq_endpoint=reserved.zmq_endpoint,
            receiver_incarnation=reserved.incarnation,
            layout_fingerprint=reserved.layout_fingerprint,
            missing=missing,
        )
        remaining_s = max(self.ask.job.deadline - self.shared.clock.now(), 0.001)
        request = request_to_proto(replace(self.ask.job.request, timeout_s=remaining_s))
        return prefill_pb2.PrefillRequest(request=request, target=target)

    def _record(self, event: str, *, cause: str = "", transfer_id: str = "", **fields: object) -> None:
        self.call.record(self.shared.ledger, event, cause=cause, transfer_id=transfer_id, **fields)
