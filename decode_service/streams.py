"""Every stream of this decode worker after its reservation: claimed by coverage, delivered, ended, reported."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from decode_service import messages
from decode_service.ports import DecodePorts
from decode_service.sink import Sink
from decode_service.step_messages import Emission, JoinBatch, LeaveBatch
from decode_service.stream import Phase, ServedStream
from decode_service.stream_run import Ended
from decode_service.stream_table import StreamTable
from decode_service.tombstones import Tombstones
from isthmus.errors import DataLoss
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2
from isthmus.worker.engine_port import DecodeEngine
from isthmus.worker.instruments import Instruments
from kv_transfer.counters import Counters
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer


@dataclass(eq=False, slots=True)
class Streams:
    """Called in the event loop alone, as are the streams themselves.

    A stream's blocks are reserved in the event loop, written by the receiver, and then owned by the step loop.
    """

    engine: DecodeEngine
    ports: DecodePorts
    instruments: Instruments
    tombstones: Tombstones
    table: StreamTable = field(default_factory=StreamTable, init=False)
    counters: Counters = field(default_factory=Counters, init=False)
    _steps: Iterator[int] = field(default_factory=partial(itertools.count, 1), init=False)

    def claimed(self, claim: ClaimedTransfer, now: float) -> None:
        """Every row has come, and the commit: the stream joins the next step."""
        self.instruments.failpoints.hit("decode.claim")
        stream = self.table.of_transfer(claim.transfer_id)
        if stream is None or stream.phase is not Phase.FILLING:
            return
        assert stream.run is not None, "a stream that fills has its run"
        request = stream.request
        self.engine.publish_prompt(request.prompt_token_ids, stream.run.block_table, request.tenant)
        ended = stream.claim(claim.tokens)
        if stream.tokens:
            self.ports.report.stream_began(stream.request_id)
        self.catch_up(stream)
        if ended is None:
            self.give_to_step_loop(stream, now)
        else:
            self._report_end(stream, ended, now)

    def failed(self, failure: FailedTransfer, now: float) -> None:
        """A sender gave up, and another may still fill the rest; or the transfer ended without a claim."""
        stream = self.table.of_transfer(failure.transfer_id)
        if stream is None or stream.phase is not Phase.FILLING:
            return
        if failure.is_ended:
            stream.end(None, self.engine.pool)
            self._remove(stream, "stream.ended", failure.reason, now)
        if not failure.finished:
            stream.reader.tell(messages.transfer_failed(stream, failure, self.engine.layout))

    def give_to_step_loop(self, stream: ServedStream, now: float) -> None:
        """It runs from the next step on."""
        self.ports.post(JoinBatch(stream.give_run(now), self.instruments.progress.num_steps))

    def end(self, stream: ServedStream, why: Ended, now: float) -> None:
        """Ends a stream in any phase; one that has ended and is kept is forgotten."""
        stream.ask_end(why)
        match stream.phase:
            case Phase.RUNNING:
                self.ports.post(LeaveBatch(stream.transfer_id, why))  # the step loop owns it and reports the end
            case Phase.ENDED:
                if self.table.forget(stream):
                    self.ports.report.stream_ended(stream.request_id)
            case Phase.FILLING:
                self.ports.receiver.cancel(stream.transfer_id, why.finish_reason.value)
                self._report_end(stream, why, now)
            case Phase.MOVING:
                if stream.outgoing is not None:
                    stream.outgoing.abort(why.finish_reason.value)
                self._report_end(stream, why, now)

    def moved(self, stream: ServedStream, now: float) -> None:
        """Another worker has the stream: nothing of it is left here, and nobody is told that it ended."""
        stream.end(None, self.engine.pool)
        self._remove(stream, "stream.moved", "", now)
        self.ports.report.stream_ended(stream.request_id)

    def deliver(self, emissions: Sequence[Emission], now: float) -> None:
        """Records one step's tokens and sends them, one message per router, then the ends.

        What a router has been sent before is not sent again.
        """
        self.instruments.failpoints.hit("decode.before_send_tokens")
        step = next(self._steps)
        by_sink: dict[Sink | None, list[decode_pb2.StreamTokens]] = {}
        ended: list[tuple[ServedStream, Ended]] = []
        for emission in emissions:
            stream = self.table.of_transfer(emission.transfer_id)
            assert stream is not None, "a stream is here until its end is delivered"
            stream.record(emission.index, emission.tokens)
            if stream.request.emitted_token_ids:
                self._note_replay(stream, emission.index, now)
            reader = stream.reader
            unsent = stream.tokens[reader.num_sent :]
            if unsent:
                by_sink.setdefault(reader.sink, []).append(messages.stream_tokens(stream, unsent))
                reader.count_sent(len(unsent))
            if emission.ended is not None:
                ended.append((stream, emission.ended))
        for sink, parts in by_sink.items():
            if sink is not None:
                sink.send(decode_pb2.StepTokens(step=step, streams=parts))
        for stream, why in ended:
            self._report_end(stream, why, now)

    def catch_up(self, stream: ServedStream) -> None:
        """Sends a claimed stream's tokens that its router has not been sent; none are the sign that it is claimed."""
        unsent = stream.tokens[stream.reader.num_sent :]
        part = messages.stream_tokens(stream, unsent)
        stream.reader.tell(decode_pb2.StepTokens(step=next(self._steps), streams=[part]))
        stream.reader.count_sent(len(unsent))

    def restate(self) -> None:
        """Reports every open handoff and every stream that somebody may look for, as if they were new."""
        self.ports.receiver.restate()
        for stream in [*self.table, *self.table.kept()]:
            if stream.phase is not Phase.FILLING:
                self.ports.report.stream_began(stream.request_id)

    def _note_replay(self, stream: ServedStream, index: int, now: float) -> None:
        """When the emission that begins at `index` brought the last of the emitted tokens."""
        num_emitted = len(stream.request.emitted_token_ids)
        if index < num_emitted <= len(stream.tokens):
            ms = round((now - stream.joined_at) * 1000, 1)
            num_replayed = num_emitted - stream.num_claimed
            stream.note(self.instruments.ledger, "stream.replayed", num_tokens=num_replayed, ms=ms)

    def _report_end(self, stream: ServedStream, why: Ended, now: float) -> None:
        if why.reason == DataLoss.reason:
            self.counters.add("replay.mismatch")
        stream.end(why, self.engine.pool)
        self._remove(stream, "stream.ended", why.reason or why.finish_reason.value, now)
        reader = stream.reader
        reader.tell(messages.stream_ended(stream, why))
        if reader.retention_s is not None:
            reader.keep(now + reader.retention_s)
        if reader.keep_until is not None and (stream.ending or why).finish_reason is not FinishReason.CANCELLED:
            oldest = self.table.keep(stream)
            if oldest is not None:
                self.end(oldest, why, now)
        elif stream.tokens:
            self.ports.report.stream_ended(stream.request_id)

    def _remove(self, stream: ServedStream, event: str, cause: str, now: float) -> None:
        self.table.remove(stream)
        self.tombstones.add(stream.request_id, stream.reader.attach.counter, now)
        self.ports.receiver.release(stream.transfer_id)
        stream.note(self.instruments.ledger, event, cause, num_tokens=len(stream.tokens))
