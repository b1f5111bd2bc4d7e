"""One attempt at a request: placed, filled, followed to its end; and what the events of its workers mean.

Either source of tokens may fail while the other still finishes the request. What happens after a failure is in
`recovery`, moves to another decode worker are in `moving`.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from isthmus.convert import request_to_proto
from isthmus.errors import StaleOwner, TransferIncomplete
from isthmus.routine import FOREVER
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, inference_pb2, prefill_pb2, types_pb2
from router.life.losses import AttemptFailed, Role, raise_early_end
from router.life.moving import Moving
from router.life.parts import AttemptContext
from router.pool.decode_stream import Arrival, Failed, Source, WorkerEvent
from router.pool.placement import DecodePlace, PrefillPlace
from router.pool.policy import Need

DONE_WAIT_S = 1.0  # for prefill's figures, once everything else is there
CLAIM_WAIT_S = 0.5  # for decode's first word, when nothing should be missing any more


class Attempt:
    """Written by the request's routine. As a context manager it gives everything back that it holds.

    `decode` is who has the stream, `prefill` who fills it (None: nobody has to), `moving` where it goes next.
    """

    def __init__(self, context: AttemptContext, need: Need, source: Source):
        self._context = context
        self._opened = context.opened
        self._routine = context.routine
        self._inbox = source.inbox
        self._held = ExitStack()
        self._first_token: prefill_pb2.FirstToken | None = None
        self._is_prefill_computing = False
        self._is_prefill_over = False
        self.need = need
        self._source = source
        self.decode: DecodePlace | None = None
        self.prefill: PrefillPlace | None = None
        self.missing: list[types_pb2.Extent] = []  # what prefill has to bring
        # Of the transfer: writers with a lower number are refused. An attached stream's is not known here.
        self.transfer_attempt = 1
        self.has_claim = False  # decode has spoken: it has all blocks, prefill is needed no more
        self.moving: Moving | None = None  # decode drains: the stream should move

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.stream = None
        if self.moving is not None:
            self.moving.close()
        self._held.close()

    async def place(self) -> None:
        """Prefill first: blocks are set aside only when somebody can fill them soon."""
        placement = self._context.parts.placement
        try:
            prefill = self._held.enter_context(await placement.prefill(self.need, self._routine))
            decode = await placement.decode(self.need, self._source, self._routine)
        except StaleOwner as refused:  # an earlier reservation is still held there: the next counter is higher
            raise AttemptFailed("decode", refused, was_computing=False) from refused
        self.take_decode(decode)
        placement.remember(self.need, prefill, decode)
        self.take_prefill(prefill, list(decode.stream.reserved.missing))
        self._context.parts.failpoints.hit("router.placed")

    def take_attached(self, place: DecodePlace) -> bool:
        """Goes on with a stream that was attached; nobody has to fill it. False: the client has every token already."""
        self.take_decode(place)
        self.transfer_attempt = 0
        self._opened.served_by.router = self._context.parts.router_name
        is_whole = self._opened.delivery.finish_reason is not None
        if is_whole:
            place.stream.let_go()  # the worker keeps it for its retention
        return not is_whole

    def take_decode(self, place: DecodePlace) -> None:
        """Decode's place from now on: what is done to its stream is done there."""
        self.decode = self._held.enter_context(place)
        self._opened.stream = place.stream
        self.moving = Moving() if place.worker.session.is_leaving else None
        self._opened.served_by.decode = place.worker.record.name

    def take_prefill(self, place: PrefillPlace, missing: list[types_pb2.Extent]) -> None:
        """Prefill's place from now on; `run` calls it."""
        self.prefill = place
        self.missing = missing
        self._opened.times.note_placed(self._routine.now)
        names = {"prefill": place.worker.record.name, "decode": self.stream_place.worker.record.name}
        self._opened.served_by.router = self._context.parts.router_name
        self._opened.served_by.prefill = names["prefill"]
        transfer_id = self.stream_place.stream.reserved.transfer_id
        self._opened.record(self._context.parts.ledger, "request.placed", transfer_id=transfer_id, **names)

    @property
    def stream_place(self) -> DecodePlace:
        """Decode's place, once there is one."""
        assert self.decode is not None, "a place at decode comes first"
        return self.decode

    async def run(self) -> None:
        """Until the client has everything. Raises AttemptFailed, or what ends the request for good."""
        if self.prefill is None:
            await self._wait_for_claim()
            await self._follow()
            return
        self._first_token = None
        self._is_prefill_computing = False
        self._is_prefill_over = False
        with self.prefill as place:
            remaining_s = self.need.deadline - self._routine.now
            place.begin(self._prefill_request(), Source(self._inbox), remaining_s)
            await self._follow()
            await self._wait_for_done()

    def release_prefill(self) -> None:
        """Nobody has to fill the stream."""
        self.prefill = None

    async def flush(self) -> None:
        """Tells the client what has come since the last message, if anything has."""
        if chunk := self._opened.delivery.take_chunk():
            await self._context.tell(inference_pb2.GenerateResponse(tokens=chunk))
            self._opened.times.note_sent(self._routine.now)

    async def _wait_for_claim(self) -> None:
        """A claimed stream says so at once; whoever was to fill another one is gone."""
        until = self._routine.now + CLAIM_WAIT_S
        while not self.has_claim:
            if not await self._advance(until):
                unfilled = TransferIncomplete("the stream was attached before its blocks had come")
                raise AttemptFailed("decode", unfilled, was_computing=False)
        await self._pass_on()

    async def _follow(self) -> None:
        """Passes tokens on as they come, several in one message when the client is slower than they are."""
        while self._opened.delivery.finish_reason is None:
            if self.moving is None:
                await self._advance(FOREVER)
            else:
                await self.moving.go_on(self, self._context, self._advance)
            await self._pass_on()

    async def _wait_for_done(self) -> None:
        """Prefill's figures, if they come soon; the client's last message waits for nothing else."""
        until = self._routine.now + DONE_WAIT_S
        while not self._is_prefill_over and await self._routine.wait_for(lambda: self._inbox.has_any, until):
            for arrival in self._inbox.take():
                if self._is_prefills(arrival) and isinstance(arrival.event, prefill_pb2.Done | Failed):
                    self._note_prefill_over(arrival.event)

    async def _pass_on(self) -> None:
        """To the client, what has come; and to decode, that it was the end."""
        opened = self._opened
        if self._first_token is not None:
            opened.num_cached_tokens = max(opened.num_cached_tokens, self._first_token.num_cached_tokens)
        if opened.delivery.finish_reason is not None:
            self._end_stream(opened.delivery.finish_reason)
        if self._context.recovery is not None:
            self._context.recovery.progressed(self)
        self._context.parts.failpoints.hit("router.before_token")
        await self.flush()

    def _end_stream(self, reason: FinishReason) -> None:
        delivery = self._opened.delivery
        stream = self.stream_place.stream
        if self._needs_no_decode or (delivery.num_tokens > 1 and not delivery.is_cut_by_text):
            stream.let_go()  # the worker finds the same end by itself
        else:
            stream.end(reason)

    def _prefill_request(self) -> prefill_pb2.PrefillRequest:
        """The target is the decode worker's own word, passed on unread."""
        reserved = self.stream_place.stream.reserved
        target = prefill_pb2.TransferTarget(
            transfer_id=reserved.transfer_id,
            attempt=self.transfer_attempt,
            zmq_endpoint=reserved.zmq_endpoint,
            receiver_incarnation=reserved.incarnation,
            layout_fingerprint=reserved.layout_fingerprint,
            missing=self.missing,
        )
        remaining_s = max(self.need.deadline - self._routine.now, 0.001)
        request = request_to_proto(replace(self.need.request, timeout_s=remaining_s))
        return prefill_pb2.PrefillRequest(request=request, target=target)

    @property
    def _needs_no_decode(self) -> bool:
        """Prefill ended the request at token 0 and tells decode itself."""
        return self._first_token is not None and bool(self._first_token.finish_reason)

    async def _advance(self, until: float) -> bool:
        """Waits for events and takes them all; False when none has come at `until`."""
        if not await self._routine.wait_for(lambda: self._inbox.has_any, until):
            return False
        failure: AttemptFailed | None = None
        for arrival in self._inbox.take():
            try:
                self._take(arrival)
            except AttemptFailed as failed:  # what came with it is good
                failure = failure or failed
        if failure is not None and self._opened.delivery.finish_reason is None:
            raise failure
        return True

    def _is_prefills(self, arrival: Arrival) -> bool:
        return self.prefill is not None and arrival.source is self.prefill.source

    def _take(self, arrival: Arrival) -> None:
        at, source, event = arrival
        match event:
            case prefill_pb2.Queued():
                self._is_prefill_computing = event.num_ahead == 0
            case prefill_pb2.Progress():
                self._is_prefill_computing = True
            case prefill_pb2.FirstToken():
                self._first_token = event
                self._is_prefill_computing = False
                self._opened.times.note_prefill_token(at)
                self._opened.delivery.add(0, [event.token], at)
            case prefill_pb2.Done() | Failed() if self._is_prefills(arrival):
                self._note_prefill_over(event)
            case decode_pb2.StreamTokens():
                self._take_tokens(source, event, at)
            case decode_pb2.Moved() if self.moving is not None:
                self.moving.note_answer(event)
            case decode_pb2.Leaving():
                self.moving = self.moving or Moving()
            case _ if self.moving is not None and source is self.moving.target_source:
                self.moving.note_target_lost()
            case decode_pb2.Moved():
                pass  # of a move that is over
            case _:
                self._take_end(event)

    def _take_tokens(self, source: Source, event: decode_pb2.StreamTokens, at: float) -> None:
        self.has_claim = True
        if self.moving is not None and source is self.moving.target_source:
            self.moving.note_arrival()
        self._opened.delivery.add(event.index, event.tokens, at)
        if event.index + len(event.tokens) > 1:
            self._opened.times.note_decode_token(at)

    def _take_end(self, event: WorkerEvent) -> None:
        """Decode's word that it has the stream no longer, or not the blocks for it."""
        match event:
            case decode_pb2.TransferFailed():
                if self.has_claim or (self.transfer_attempt and event.attempt != self.transfer_attempt):
                    return  # about a writer that is refused meanwhile
                role: Role = "decode" if event.reason == "fill_deadline" else "prefill"
                lost = TransferIncomplete(f"the prompt's blocks did not arrive: {event.reason}")
                raise AttemptFailed(role, lost, was_computing=False)
            case decode_pb2.StreamEnded():
                if self._opened.delivery.finish_reason is None:
                    raise_early_end(event)
            case Failed():
                was_computing = self.has_claim and self.moving is None
                raise AttemptFailed("decode", event.error, was_computing=was_computing, has_others=event.has_others)
            case _:
                raise AssertionError(f"{type(event).__name__} is not decode's to send")

    def _note_prefill_over(self, event: prefill_pb2.Done | Failed) -> None:
        self._is_prefill_over = True
        if isinstance(event, prefill_pb2.Done):
            self._opened.times.done = event
        if self.has_claim or self._needs_no_decode or self._opened.delivery.finish_reason is not None:
            return  # nobody needs the blocks any more; of a request that is over decode may have refused them
        has_others = False
        if isinstance(event, Failed):
            error = event.error
            has_others = event.has_others
        elif event.acked:
            return
        else:
            error = TransferIncomplete(f"the prompt's blocks did not arrive: {event.failure}")
        raise AttemptFailed("prefill", error, was_computing=self._is_prefill_computing, has_others=has_others)
