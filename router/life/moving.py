"""A stream whose decode worker drains: towards another worker, while it goes on where it is until that one speaks."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

from isthmus.errors import IsthmusError
from isthmus.routine import Routine
from isthmus.v1 import decode_pb2
from router.client.opened_request import OpenedRequest
from router.pool.decode_stream import Source
from router.pool.placement import DecodePlace, Placement
from router.pool.policy import Need

MOVE_RETRY_S = 0.25


class MovingAttempt(Protocol):
    """What a move needs of the attempt whose stream moves."""

    need: Need
    has_claim: bool

    @property
    def stream_place(self) -> DecodePlace: ...

    def take_decode(self, place: DecodePlace) -> None: ...


class MovingContext(Protocol):
    """What a move needs of the request's life."""

    @property
    def placement(self) -> Placement: ...

    @property
    def routine(self) -> Routine: ...

    @property
    def opened(self) -> OpenedRequest: ...

    def record(self, event: str, *, cause: str = "", transfer_id: str = "", **fields: object) -> None: ...


@dataclass(eq=False, slots=True)
class Moving:
    """From the worker's word that it leaves until another one has the stream. Written by the attempt's routine."""

    target: DecodePlace | None = field(default=None, init=False)  # who is to have the stream
    target_source: Source | None = field(default=None, init=False)  # by which that one is heard
    _failure: str | None = field(default=None, init=False)
    _has_arrived: bool = field(default=False, init=False)
    _try_at: float = field(default=0.0, init=False)

    def note_answer(self, moved: decode_pb2.Moved) -> None:
        """The old worker's answer to Move."""
        self._failure = None if moved.acked else moved.failure or "refused"

    def note_arrival(self) -> None:
        """The new worker has spoken: it has the stream."""
        self._has_arrived = True

    def note_target_lost(self) -> None:
        self._failure = "the stream's next worker could not take it"

    def close(self) -> None:
        """What was set aside at the new worker is given back."""
        if self.target is not None:
            with self.target:
                self.target = None
        self.target_source = None

    async def go_on(
        self, attempt: MovingAttempt, context: MovingContext, advance: Callable[[float], Awaitable[object]]
    ) -> None:
        """`advance(until)` takes what comes, also tokens of the worker that still has the stream."""
        await advance(context.routine.now + MOVE_RETRY_S)
        if self._has_arrived and self.target is not None:
            self._settle(self.target, attempt, context)
        elif context.opened.delivery.finish_reason is None:
            await self._try(attempt, context)

    def _settle(self, target: DecodePlace, attempt: MovingAttempt, context: MovingContext) -> None:
        left = attempt.stream_place
        left.stream.let_go()
        self.target = None  # the attempt's from now on
        attempt.take_decode(target)
        names = {"worker": left.worker.record.name, "to": target.worker.record.name}
        context.record("request.moved", transfer_id=target.stream.reserved.transfer_id, **names)

    async def _try(self, attempt: MovingAttempt, context: MovingContext) -> None:
        """Sets blocks aside at another worker and asks the old one to send the stream there."""
        if self._failure is not None and self.target is not None:
            context.record("request.move_failed", cause=self._failure)
            self.close()
        now = context.routine.now
        if self.target is not None or not attempt.has_claim or now < self._try_at:
            return
        self._try_at = now + MOVE_RETRY_S
        self._failure = None
        context.opened.counter += 1
        request = replace(attempt.need.request, emitted_token_ids=tuple(context.opened.delivery.token_ids))
        need = replace(attempt.need, request=request, counter=context.opened.counter, moves=True)
        source = Source(attempt.stream_place.stream.source.inbox)
        self.target_source = source
        place = await context.placement.decode_at_once(need, source, context.routine)
        if isinstance(place, IsthmusError):
            self.target_source = None
            return
        self.target = place
        stream = attempt.stream_place.stream
        stream.session.send_move(stream, place.stream.reserved, context.routine.now)
