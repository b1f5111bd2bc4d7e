"""Reserving a stream: whether this worker takes the request, and what the receiver may then write."""

from dataclasses import dataclass, field

from decode_service import messages
from decode_service.block_reservation import check_request, reserve_blocks
from decode_service.reader import AttachKey, Reader
from decode_service.sink import Sink
from decode_service.stream import ServedStream
from decode_service.stream_run import Ended, StreamRun
from decode_service.stream_table import MAX_STREAMS
from decode_service.streams import Streams
from isthmus.errors import Draining, IsthmusError, Overloaded, RequestCancelled, StaleOwner
from isthmus.types import FinishReason, Request
from kv_transfer.coverage import clipped
from kv_transfer.transfers import Reservation


@dataclass(frozen=True, slots=True)
class Terms:
    """What a router asks for beside the request. Seconds."""

    fill_timeout_s: float | None = None  # None, or longer than the worker's own: the worker's own
    retention_s: float | None = None  # on_disconnect retain; None: abort
    moves: bool = False  # another decode worker brings the blocks, those of its tokens included


@dataclass(eq=False, slots=True)
class Reservations:
    """Called in the event loop alone."""

    streams: Streams
    fill_timeout_s: float
    _is_draining: bool = field(default=False, init=False)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    def stop(self) -> None:
        """Nothing is reserved any more: the worker drains."""
        self._is_draining = True

    def reserve(self, request: Request, attach: AttachKey, sink: Sink, terms: Terms, now: float) -> ServedStream:
        """Reserves blocks for prompt and max_tokens and opens the receiver for what is missing.

        A stream of this request that a lower counter holds makes way; only another router is told. Raises Draining,
        Overloaded, NoFreeBlocks, InvalidRequest, RequestCancelled or StaleOwner; nothing is kept then.
        """
        self.streams.instruments.failpoints.hit("decode.reserve")
        self._check_admissible(request, attach, now)
        num_emitted = len(request.emitted_token_ids)
        reader = Reader(attach, sink, terms.retention_s, num_sent=num_emitted)
        stream, run = self._new_stream(request, reader, terms, now)
        reservation = Reservation(
            transfer_id=stream.transfer_id,
            attempt=stream.attempt,
            request_id=request.request_id,
            block_table=tuple(run.block_table),
            missing=stream.missing,
            deadline=self._fill_deadline(run, terms.fill_timeout_s, now),
            open_from=stream.num_prompt_tokens if terms.moves else None,
        )
        try:
            self.streams.ports.receiver.reserve(reservation)
        except IsthmusError:
            run.free(self.streams.engine.pool)
            raise
        self.streams.table.add(stream)
        ledger = self.streams.instruments.ledger
        stream.note(ledger, "stream.reserved", cached=stream.num_cached_tokens, emitted=num_emitted)
        return stream

    def rearm(self, stream: ServedStream, attempt: int, fill_timeout_s: float | None, now: float) -> None:
        """Another writer may fill what is missing, which is then `stream.missing`. Raises StaleOwner."""
        assert stream.run is not None, "a stream that fills has its run"
        deadline = self._fill_deadline(stream.run, fill_timeout_s, now)
        missing = self.streams.ports.receiver.rearm(stream.transfer_id, attempt, deadline)
        stream.rearm(attempt, clipped(missing, stream.num_prompt_tokens))

    def _check_admissible(self, request: Request, attach: AttachKey, now: float) -> None:
        if self._is_draining:
            raise Draining("this decode worker is draining", retry_after_s=0.1)
        check_request(self.streams.engine, request)
        old = self.streams.table.get(request.request_id)
        if old is not None:
            self._make_way(old, attach, now)
        if self.streams.tombstones.refuses(request.request_id, attach.counter, now):
            raise RequestCancelled("the request was cancelled before it was reserved")
        if len(self.streams.table) >= MAX_STREAMS:
            raise Overloaded("this decode worker has all the streams it takes", retry_after_s=0.1)

    def _make_way(self, old: ServedStream, attach: AttachKey, now: float) -> None:
        """Ends the stream that the request has here, for one with a higher counter. Raises StaleOwner for any other."""
        held = old.reader.attach
        if attach.counter <= held.counter:
            raise StaleOwner("the request is already reserved here")
        if attach.router_incarnation != held.router_incarnation:
            old.reader.tell(messages.detached(old, attach))
        old.reader.silence()
        self.streams.end(old, Ended(FinishReason.CANCELLED, detail="reserved again"), now)

    def _new_stream(self, request: Request, reader: Reader, terms: Terms, now: float) -> tuple[ServedStream, StreamRun]:
        engine = self.streams.engine
        blocks = reserve_blocks(engine, request, moves=terms.moves)
        run = StreamRun(
            request=request,
            transfer_id=self.streams.ports.ids.transfer_id(),
            context_length=engine.context_length,
            deadline=None if request.timeout_s is None else now + request.timeout_s,
            block_table=blocks.block_table,
            num_set_aside=blocks.num_set_aside,
        )
        stream = ServedStream(
            request=request,
            reader=reader,
            transfer_id=run.transfer_id,
            num_cached_tokens=blocks.num_cached_tokens,
            missing=blocks.missing,
            run=run,
        )
        return stream, run

    def _fill_deadline(self, run: StreamRun, fill_timeout_s: float | None, now: float) -> float:
        deadline = now + min(fill_timeout_s or self.fill_timeout_s, self.fill_timeout_s)
        return deadline if run.deadline is None else min(run.deadline, deadline)
