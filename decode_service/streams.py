"""Every stream of this decode worker, from reservation to its end: reserve, claim by coverage, end, report."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from decode_service import messages
from decode_service.ownership_report import OwnershipReport
from decode_service.room import check_request, take_room
from decode_service.session import NOBODY, RouterSession
from decode_service.stream import AttachKey, Emission, Ended, Phase, Stream
from decode_service.tombstones import Tombstones
from decode_service.worker import StepLoop
from isthmus.engine.engine import Engine
from isthmus.errors import DataLoss, Draining, IsthmusError, Overloaded, RequestCancelled, StaleOwner
from isthmus.ids import SystemIds
from isthmus.process.worker_context import WorkerContext
from isthmus.types import FinishReason, Request, Token
from kv_transfer.counters import Counters
from kv_transfer.coverage import clipped
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer
from kv_transfer.transfers import Reservation

MAX_STREAMS = 1024
MAX_KEPT = 1024
TOMBSTONE_SLACK_S = 5.0


@dataclass(frozen=True, slots=True)
class Terms:
    """What a router asks for beside the request. Seconds."""

    fill_timeout_s: float | None = None  # None, or longer than the worker's own: the worker's own
    retention_s: float | None = None  # on_disconnect retain; None: abort
    moves: bool = False  # another decode worker brings the blocks, those of its tokens included


@dataclass(eq=False, slots=True)
class Streams:
    """Event loop only. Blocks are set aside here, written by the receiver, then owned by the step loop."""

    engine: Engine
    receiver: Receiver
    step_loop: StepLoop
    context: WorkerContext
    report: OwnershipReport
    fill_timeout_s: float
    kept: dict[str, Stream] = field(default_factory=dict[str, Stream], init=False)  # ended, in this order
    tombstones: Tombstones = field(init=False)
    counters: Counters = field(default_factory=Counters, init=False)
    is_draining: bool = field(default=False, init=False)
    _streams: dict[str, Stream] = field(default_factory=dict[str, Stream], init=False)  # by request; not ended
    _by_transfer: dict[str, Stream] = field(default_factory=dict[str, Stream], init=False)  # those that fill
    _steps: Iterator[int] = field(default_factory=partial(itertools.count, 1), init=False)

    def __post_init__(self) -> None:
        self.tombstones = Tombstones(self.fill_timeout_s + TOMBSTONE_SLACK_S, self.context.clock)

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        """Those that have not ended, as they are now."""
        return iter(list(self._streams.values()))

    def get(self, request_id: str) -> Stream | None:
        """Also one that ended and is kept."""
        return self._streams.get(request_id) or self.kept.get(request_id)

    def reserve(self, request: Request, attach: AttachKey, session: RouterSession, terms: Terms) -> Stream:
        """Sets blocks aside for prompt and max_tokens and opens the receiver for what is missing.

        A stream of this request that a lower counter holds makes way; only another router is told. Raises Draining,
        Overloaded, NoFreeBlocks, InvalidRequest, RequestCancelled or StaleOwner; nothing is kept then.
        """
        self.context.failpoints.hit("decode.reserve")
        self._check_admissible(request, attach)
        stream = self._set_aside(request, attach, session, terms)
        reservation = Reservation(
            transfer_id=stream.transfer_id,
            attempt=stream.attempt,
            request_id=request.request_id,
            block_table=tuple(stream.block_table),
            missing=stream.missing,
            deadline=self._fill_deadline(stream, terms.fill_timeout_s),
            open_from=stream.num_prompt_tokens if terms.moves else None,
        )
        try:
            self.receiver.reserve(reservation)
        except IsthmusError:
            stream.free(self.engine.pool)
            raise
        self._streams[request.request_id] = stream
        self._by_transfer[stream.transfer_id] = stream
        stream.note(self.context.ledger, "stream.reserved", cached=stream.num_cached_tokens, emitted=stream.num_sent)
        return stream

    def rearm(self, stream: Stream, attempt: int, fill_timeout_s: float | None) -> None:
        """Another writer may fill what is missing, which is then `stream.missing`. Raises StaleOwner."""
        deadline = self._fill_deadline(stream, fill_timeout_s)
        missing = self.receiver.rearm(stream.transfer_id, attempt, deadline)
        stream.attempt, stream.missing = attempt, clipped(missing, stream.num_prompt_tokens)

    def claimed(self, claim: ClaimedTransfer) -> None:
        """Coverage is complete and the commit is there: the stream joins the next step."""
        self.context.failpoints.hit("decode.claim")
        stream = self._by_transfer.pop(claim.transfer_id, None)
        if stream is None or stream.phase is not Phase.FILLING:
            return
        self.engine.publish_prompt(stream.request.prompt_token_ids, stream.block_table)
        stream.phase = Phase.RUNNING
        ended = None
        for token in claim.tokens:
            ended = ended or stream.accept(token, self.engine.context_length)
        stream.num_claimed = len(stream.tokens)
        if stream.tokens:
            self.report.stream_began(stream.request_id)
        self.catch_up(stream)
        if ended is None:
            self.step_loop.join(stream)
        else:
            stream.free(self.engine.pool)
            self._report_end(stream, ended)

    def failed(self, failure: FailedTransfer) -> None:
        """A sender gave up, and another may still fill the rest; or the transfer ended without a claim."""
        stream = self._by_transfer.get(failure.transfer_id)
        if stream is None or stream.phase is not Phase.FILLING:
            return
        if failure.is_ended:
            del self._by_transfer[failure.transfer_id]
            stream.free(self.engine.pool)
            self._leave(stream, "stream.ended", failure.reason)
        if not failure.finished:
            stream.sink.send(messages.transfer_failed(stream, failure, self.engine.layout))

    def end(self, stream: Stream, why: Ended) -> None:
        """Ends a stream in any phase; one that has ended and is kept is forgotten."""
        stream.ending = why
        if stream.phase is Phase.RUNNING:
            self.step_loop.leave(stream, why)  # the step loop owns it and reports the end
            return
        if stream.phase is Phase.ENDED:
            if self.kept.get(stream.request_id) is stream:
                del self.kept[stream.request_id]
                self.report.stream_ended(stream.request_id)
            return
        if stream.phase is Phase.FILLING:
            self._by_transfer.pop(stream.transfer_id, None)
            self.receiver.cancel(stream.transfer_id, why.finish_reason.value)
        if stream.outgoing is not None:
            stream.outgoing.abort(why.finish_reason.value)
        stream.free(self.engine.pool)
        self._report_end(stream, why)

    def moved(self, stream: Stream) -> None:
        """Another worker has the stream: nothing of it is left here, and nobody is told that it ended."""
        stream.free(self.engine.pool)
        self._leave(stream, "stream.moved", "")
        self.report.stream_ended(stream.request_id)

    def deliver(self, emissions: Sequence[Emission]) -> None:
        """Sends one step's tokens, one message per router, then the ends. What the sink has is not sent again."""
        self.context.failpoints.hit("decode.before_send_tokens")
        step = next(self._steps)
        by_sink: dict[int, list[tuple[Stream, Sequence[Token]]]] = defaultdict(list)
        for emission in emissions:
            stream = emission.stream
            if tokens := emission.tokens[max(0, stream.num_sent - emission.index) :]:
                by_sink[id(stream.sink)].append((stream, tokens))
        for group in by_sink.values():
            group[0][0].sink.send(messages.step_tokens(step, group))
            for stream, tokens in group:
                stream.num_sent += len(tokens)
        for emission in emissions:
            if emission.ended is not None:
                self._report_end(emission.stream, emission.ended)

    def catch_up(self, stream: Stream) -> None:
        """Sends a claimed stream's tokens from `num_sent` on; none are the sign that it is claimed."""
        tokens = stream.tokens[stream.num_sent :]
        stream.sink.send(messages.step_tokens(next(self._steps), [(stream, tokens)]))
        stream.num_sent += len(tokens)

    def restate(self) -> None:
        """Reports every open handoff and every stream that somebody may look for, as if they were new."""
        self.receiver.restate()
        for stream in [*self._streams.values(), *self.kept.values()]:
            if stream.phase is not Phase.FILLING:
                self.report.stream_began(stream.request_id)

    def _check_admissible(self, request: Request, attach: AttachKey) -> None:
        if self.is_draining:
            raise Draining("this decode worker is draining", retry_after_s=0.1)
        check_request(self.engine, request)
        if (old := self.get(request.request_id)) is not None:
            if attach.counter <= old.attach.counter:
                raise StaleOwner("the request is already reserved here")
            if attach.router_incarnation != old.attach.router_incarnation:
                old.sink.send(messages.detached(old, attach))
            old.sink = NOBODY
            self.end(old, Ended(FinishReason.CANCELLED, detail="reserved again"))
        if self.tombstones.refuses(request.request_id, attach.counter):
            raise RequestCancelled("the request was cancelled before it was reserved")
        if len(self._streams) >= MAX_STREAMS:
            raise Overloaded("this decode worker has all the streams it takes", retry_after_s=0.1)

    def _set_aside(self, request: Request, attach: AttachKey, session: RouterSession, terms: Terms) -> Stream:
        room = take_room(self.engine, request, moves=terms.moves)
        return Stream(
            request=request,
            attach=attach,
            sink=session,
            retention_s=terms.retention_s,
            transfer_id=SystemIds().transfer_id(),
            attempt=1,
            **room._asdict(),
            deadline=None if request.timeout_s is None else self.context.clock.now() + request.timeout_s,
        )

    def _fill_deadline(self, stream: Stream, fill_timeout_s: float | None) -> float:
        deadline = self.context.clock.now() + min(fill_timeout_s or self.fill_timeout_s, self.fill_timeout_s)
        return deadline if stream.deadline is None else min(stream.deadline, deadline)

    def _report_end(self, stream: Stream, why: Ended) -> None:
        if why.reason == DataLoss.reason:
            self.counters.add("replay.mismatch")
        self._leave(stream, "stream.ended", why.reason or why.finish_reason.value)
        stream.sink.send(messages.stream_ended(stream, why))
        stream.ended = why
        if stream.retention_s is not None:
            stream.keep_until = self.context.clock.now() + stream.retention_s
        if stream.keep_until is not None and (stream.ending or why).finish_reason is not FinishReason.CANCELLED:
            self.kept[stream.request_id] = stream
            if len(self.kept) > MAX_KEPT:
                self.end(next(iter(self.kept.values())), why)
        elif stream.tokens:
            self.report.stream_ended(stream.request_id)

    def _leave(self, stream: Stream, event: str, cause: str) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
        self.tombstones.add(stream.request_id, stream.attach.counter)
        self.receiver.release(stream.transfer_id)
        stream.note(self.context.ledger, event, cause, num_tokens=len(stream.token_ids))
