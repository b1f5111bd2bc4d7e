"""Every stream of this decode worker, from reservation to its end: reserve, claim by coverage, cancel, report."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from decode_service import messages
from decode_service.ownership_report import OwnershipReport
from decode_service.session import RouterSession
from decode_service.stream import AttachKey, Emission, Ended, Phase, Stream
from decode_service.tombstones import Tombstones
from decode_service.worker import StepLoop
from isthmus.engine.block_pool import prefix_hashes
from isthmus.engine.engine import Engine
from isthmus.errors import Draining, InvalidRequest, NoFreeBlocks, Overloaded, RequestCancelled, StaleOwner
from isthmus.ids import new_transfer_id
from isthmus.kv_layout import KvLayout
from isthmus.serving import until_none_left
from isthmus.types import Extent, FinishReason, Request
from isthmus.worker_context import WorkerContext
from kv_transfer.events import ClaimedTransfer, FailedTransfer
from kv_transfer.receiver import Receiver
from kv_transfer.transfers import Reservation

MAX_STREAMS = 1024
TOMBSTONE_SLACK_S = 5.0


@dataclass(eq=False, slots=True)
class Streams:
    """Event loop only. Blocks are set aside here, written by the receiver, then owned by the step loop."""

    engine: Engine
    receiver: Receiver
    step_loop: StepLoop
    context: WorkerContext
    report: OwnershipReport
    fill_timeout_s: float
    _streams: dict[str, Stream] = field(default_factory=dict[str, Stream], init=False)  # by request
    _by_transfer: dict[str, Stream] = field(default_factory=dict[str, Stream], init=False)  # those that fill
    _tombstones: Tombstones = field(init=False)
    _steps: Iterator[int] = field(default_factory=partial(itertools.count, 1), init=False)
    _is_draining: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._tombstones = Tombstones(self.fill_timeout_s + TOMBSTONE_SLACK_S, self.context.clock)

    def __len__(self) -> int:
        return len(self._streams)

    def get(self, request_id: str) -> Stream | None:
        return self._streams.get(request_id)

    def reserve(
        self, request: Request, attach: AttachKey, session: RouterSession, fill_timeout_s: float | None
    ) -> Stream:
        """Sets blocks aside for prompt and max_tokens and opens the receiver for what is missing.

        The worker's own fill timeout holds where none or a longer one is given. Raises Draining, Overloaded,
        NoFreeBlocks, InvalidRequest or RequestCancelled; nothing is kept then.
        """
        self._check_admissible(request, attach)
        stream = self._set_aside(request, attach, session)
        now = self.context.clock.now()
        fill_timeout_s = min(fill_timeout_s or self.fill_timeout_s, self.fill_timeout_s)
        fill_deadline = now + fill_timeout_s if stream.deadline is None else min(stream.deadline, now + fill_timeout_s)
        self.receiver.reserve(
            Reservation(
                transfer_id=stream.transfer_id,
                attempt=stream.attempt,
                request_id=request.request_id,
                block_table=tuple(stream.block_table),
                missing=stream.missing,
                deadline=fill_deadline,
            )
        )
        self._streams[request.request_id] = stream
        self._by_transfer[stream.transfer_id] = stream
        return stream

    def claimed(self, claim: ClaimedTransfer) -> None:
        """Coverage is complete and the commit is there: the stream joins the next step."""
        stream = self._by_transfer.pop(claim.transfer_id, None)
        if stream is None or stream.phase is not Phase.FILLING:
            return
        self._publish_prompt_blocks(stream)
        stream.phase = Phase.RUNNING
        stream.append(claim.token)
        self.report.stream_began(stream.request_id)
        self.context.ledger.record("stream.joined", request_id=stream.request_id, transfer_id=stream.transfer_id)
        stream.sink.send(messages.step_tokens(next(self._steps), [Emission(stream, 0, claim.token, None)]))
        self.step_loop.join(stream)

    def failed(self, failure: FailedTransfer) -> None:
        """The transfer ended without a claim: prefill needed no decode, gave up, or the fill deadline passed."""
        stream = self._by_transfer.pop(failure.transfer_id, None)
        if stream is None or stream.phase is not Phase.FILLING:
            return
        stream.free(self.engine.pool)
        self._forget(stream, Ended(FinishReason.STOP if failure.finished else FinishReason.ERROR, failure.reason))
        if not failure.finished:
            stream.sink.send(messages.transfer_failed(stream, failure.missing, failure.reason))

    def cancel(self, request_id: str, attach: AttachKey, finish_reason: FinishReason) -> None:
        """Ends a stream in any phase; one not here yet is refused when it comes. A stale router is ignored."""
        stream = self._streams.get(request_id)
        if stream is None:
            self._tombstones.add(request_id, attach.counter)
            return
        if attach.counter < stream.attach.counter:
            self.context.ledger.record("cancel.stale", request_id=request_id, cause=attach.router_incarnation)
            return
        self._end(stream, Ended(finish_reason))

    def end_session(self, session: RouterSession) -> None:
        """The router is gone: its streams end, because nobody reads them (on_disconnect: abort)."""
        for stream in [stream for stream in self._streams.values() if stream.sink is session]:
            self._end(stream, Ended(FinishReason.CANCELLED, detail="router session lost"))

    async def drain(self, timeout_s: float) -> int:
        """Refuses new streams; returns how many are left when all have ended or the time is over."""
        self._is_draining = True
        return await until_none_left(self.__len__, timeout_s)

    def end_all(self, detail: str) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, Ended(FinishReason.CANCELLED, detail=detail))

    def deliver(self, emissions: Sequence[Emission]) -> None:
        """Sends one step's tokens, one message per router, then the ends."""
        step = next(self._steps)
        by_sink: dict[int, list[Emission]] = defaultdict(list)
        for emission in emissions:
            by_sink[id(emission.stream.sink)].append(emission)
        for group in by_sink.values():
            if any(emission.token is not None for emission in group):
                group[0].stream.sink.send(messages.step_tokens(step, group))
        for emission in emissions:
            if emission.ended is not None:
                self._report_end(emission.stream, emission.ended)

    def _check_admissible(self, request: Request, attach: AttachKey) -> None:
        if self._is_draining:
            raise Draining("this decode worker is draining", retry_after_s=0.1)
        if self._tombstones.refuses(request.request_id, attach.counter):
            raise RequestCancelled("the request was cancelled before it was reserved")
        if request.request_id in self._streams:
            raise StaleOwner("the request is already reserved here")
        if len(self._streams) >= MAX_STREAMS:
            raise Overloaded("this decode worker has all the streams it takes", retry_after_s=0.1)
        num_positions = len(request.prompt_token_ids) + request.sampling.max_tokens
        if not request.prompt_token_ids or num_positions > self.engine.context_length:
            allowed = f"1 to {self.engine.context_length} positions with max_tokens"
            raise InvalidRequest.of("prompt_token_ids", f"{num_positions} positions", allowed)
        if request.numerics_digest and request.numerics_digest != self.engine.numerics.digest:
            raise StaleOwner("the request belongs to another numerics class")

    def _set_aside(self, request: Request, attach: AttachKey, session: RouterSession) -> Stream:
        prompt, pool, layout = request.prompt_token_ids, self.engine.pool, self.engine.layout
        cached = pool.match(prefix_hashes(prompt, pool.block_size, layout.fingerprint))
        num_prompt_blocks = layout.num_blocks(len(prompt))
        num_all_blocks = layout.num_blocks(len(prompt) + request.sampling.max_tokens - 1)
        try:
            pool.set_aside(num_all_blocks - len(cached))
        except NoFreeBlocks:
            pool.release(cached)
            raise
        blocks = cached + pool.allocate(num_prompt_blocks - len(cached), from_set_aside=True)
        num_cached_tokens = len(cached) * pool.block_size
        return Stream(
            request=request,
            attach=attach,
            sink=session,
            transfer_id=new_transfer_id(),
            attempt=1,
            block_table=blocks,
            num_set_aside=num_all_blocks - num_prompt_blocks,
            num_cached_tokens=num_cached_tokens,
            missing=_extents(layout, num_cached_tokens, len(prompt)),
            deadline=None if request.timeout_s is None else self.context.clock.now() + request.timeout_s,
        )

    def _publish_prompt_blocks(self, stream: Stream) -> None:
        """Full prompt blocks become reusable by content; blocks with generated tokens never do (other rounding)."""
        hashes = prefix_hashes(
            stream.request.prompt_token_ids, self.engine.pool.block_size, self.engine.layout.fingerprint
        )
        for block_id, block_hash in zip(stream.block_table, hashes, strict=False):
            self.engine.pool.publish(block_id, block_hash)

    def _end(self, stream: Stream, why: Ended) -> None:
        if stream.phase is Phase.RUNNING:
            self.step_loop.leave(stream, why)  # the step loop owns it and reports the end
            return
        if stream.phase is Phase.FILLING:
            self._by_transfer.pop(stream.transfer_id, None)
            self.receiver.cancel(stream.transfer_id, why.finish_reason.value)
            stream.free(self.engine.pool)
            self._report_end(stream, why)

    def _report_end(self, stream: Stream, why: Ended) -> None:
        self._forget(stream, why)
        stream.sink.send(messages.stream_ended(stream, why))

    def _forget(self, stream: Stream, why: Ended) -> None:
        if self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
        self._tombstones.add(stream.request_id, stream.attach.counter)
        if stream.token_ids:  # claimed once: the receiver and the mirror still know it
            self.receiver.release(stream.transfer_id)
            self.report.stream_ended(stream.request_id)
        self.context.ledger.record(
            "stream.ended",
            request_id=stream.request_id,
            transfer_id=stream.transfer_id,
            cause=why.reason or why.finish_reason.value,
            num_tokens=len(stream.token_ids),
        )


def _extents(layout: KvLayout, first: int, end: int) -> tuple[Extent, ...]:
    """Positions [first, end) of every plane and layer."""
    places = ((plane, layer) for plane, kind in enumerate(layout.planes) for layer in range(kind.num_layers))
    return tuple(Extent(plane, layer, first, end - first) for plane, layer in places if end > first)
