"""One request's life: admit, accept, place, try until it is done, finish. What it holds ends with it.

    queued --slot--> accepted --attempts, one after another--> finished
       +--------------------+---- refused, cancelled, deadline, failed, client gone ----> ended

A core: each life is one routine. Its caller (gRPC, later HTTP too) is a port, told one message after another.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from isthmus.errors import AttachedElsewhere, DeadlinePassed, Draining, IsthmusError, RequestCancelled, SlowClient
from isthmus.kv.prefix import prefix_hashes, prefix_scope
from isthmus.process.loop_driver import Drive, Driver
from isthmus.routine import Interrupted, Routine
from isthmus.types import FinishReason
from isthmus.v1 import inference_pb2
from router.client.opened_request import OpenedRequest, RequestOpener
from router.life.attempt import Attempt, AttemptContext, LifeParts
from router.life.locate import Locator
from router.life.losses import AttemptFailed
from router.life.recovery import Recovery
from router.pool.admission import Admission, Order
from router.pool.decode_stream import MAX_BUFFERED_TOKENS, Inbox, Source
from router.pool.placement import DecodePlace, Need
from router.pool.policy import STRIDE_TOKENS, NumericsClass


class ClientGone(Exception):
    """The client left, and the request ends with it. Nobody is told."""


class Caller(Protocol):
    """The client's end of a call. Neither method waits."""

    def tell(self, message: inference_pb2.GenerateResponse) -> None:
        """One at a time: the life hears `told` before it tells the next."""
        ...

    def end(self, error: BaseException | None) -> None:
        """Nothing follows. None: the last message was `finished`."""
        ...


@dataclass(frozen=True, slots=True)
class LifeSettings:
    queue_timeout_s: float
    max_buffered_tokens: int = MAX_BUFFERED_TOKENS


@dataclass(frozen=True, slots=True)
class ResumeWish:
    """What a Resume call asks for."""

    request_id: str
    next_index: int
    timeout_s: float


@dataclass(eq=False, slots=True)
class Lives:
    """All request lives of a router. Written by itself: lives are begun here and end by themselves."""

    parts: LifeParts
    admission: Admission
    locator: Locator
    opener: RequestOpener
    settings: LifeSettings
    drive: Drive
    on_end: Callable[[OpenedRequest | None, str], None]  # the request, if it was opened, and how it ended
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

    def find(self, request_id: str) -> "RequestLife | None":
        """The life whose client has the stream, or whose client left it for its retention."""
        return self._by_request.get(request_id)

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
        self._attempt: Attempt | None = None
        self._recovery: Recovery | None = None
        self._is_telling = False
        self._is_known = False  # the client has been told the request's id: it can come back for it
        self._has_left = False
        self.is_over = False

    def begin(self, opened: OpenedRequest) -> None:
        self._routine.interrupt(DeadlinePassed("the request's deadline has passed"), at=opened.deadline)
        self._routine.begin(self._serve(opened))

    def resume(self, wish: ResumeWish) -> None:
        self._routine.begin(self._resume(wish))

    def turn(self, now: float) -> float | None:
        """Goes on until it waits; when it is over its caller hears so."""
        try:
            at = self._routine.turn(now)
        except Interrupted as interrupted:
            self._end(interrupted.cause)
        except Exception as error:
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
        place = self._attempt.decode if self._attempt is not None else None
        keeps = self._opened is not None and bool(self._opened.retention_s)
        if keeps and place is not None and place.stream.is_claimed:
            place.stream.let_go()
            self.interrupt(why)

    async def _serve(self, opened: OpenedRequest) -> None:
        """Tells `accepted`, tokens and `finished`. Raises what ended the request instead of `finished`."""
        self._note_opened(opened)
        placement = self._lives.parts.placement
        order = await self._admitted(opened)
        queue_deadline = self._queue_deadline(opened)
        if opened.delivery.finish_reason is None:
            numerics = await placement.numerics_class(queue_deadline, self._routine)
            need = self._need(opened, order, numerics, queue_deadline)
            await self._tell(opened.accepted(numerics))
            self._record("request.accepted", num_prompt_tokens=len(opened.request.prompt_token_ids))
            await self._try_until_done(opened, need)
        else:  # all its tokens were emitted before: only the end was missing
            await self._tell(opened.accepted(NumericsClass("", "", "")))
        await self._finish(opened)
