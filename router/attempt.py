"""What the events of one attempt mean: either source may fail while the other still finishes the request."""

import asyncio

from isthmus.convert import finish_reason_from_proto
from isthmus.errors import DataLoss, DeadlinePassed, Draining, IsthmusError, TransferIncomplete
from isthmus.process.rpc_errors import typed_error
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, prefill_pb2
from router.delivery import Delivery, Timeline
from router.inbox import Arrival, Event, Failed, Source
from router.losses import Role

DONE_WAIT_S = 1.0  # for prefill's figures, once everything else is there
MOVE_RETRY_S = 0.25


class AttemptFailed(Exception):
    """One of the attempt's workers can do no more for it."""

    def __init__(self, role: Role, error: IsthmusError, *, was_computing: bool, in_company: bool = False):
        super().__init__(error.detail)
        self.in_company = in_company  # and that of others
        self.role: Role = role
        self.error = error
        self.was_computing = was_computing  # the request's own computation ran there


class Attempt:
    """Owned by the request's task; lives from placement to the end or failure of one attempt.

    `decode` is who has the stream, `prefill` who fills it (None: nobody has to), `target` who is to have it next.
    """

    def __init__(self, decode: Source, delivery: Delivery, timeline: Timeline, *, is_attached: bool = False):
        self._inbox = decode.inbox
        self._delivery = delivery
        self._timeline = timeline
        self.decode = decode
        self.prefill: Source | None = None
        self.target: Source | None = None
        # Of the transfer: prefill workers before this one are fenced. An attached stream's is not known here.
        self.number = 0 if is_attached else 1
        self.has_claim = False  # decode has spoken: it has all blocks, prefill is needed no more
        self.is_leaving = False  # decode drains: the stream should move
        self.move_failure: str | None = None
        self._first_token: prefill_pb2.FirstToken | None = None
        self._is_prefill_computing = False
        self._is_prefill_over = False

    def expect_prefill(self) -> Source:
        """A prefill worker's source; nothing more is heard of the one before."""
        if self.prefill is not None:
            self.prefill.close()
        self._first_token, self._is_prefill_computing, self._is_prefill_over = None, False, False
        self.prefill = Source(self._inbox)
        return self.prefill

    def expect_target(self) -> Source:
        self.move_failure, self.target = None, Source(self._inbox)
        return self.target

    @property
    def num_cached_tokens(self) -> int:
        return self._first_token.num_cached_tokens if self._first_token else 0

    @property
    def needs_no_decode(self) -> bool:
        """Prefill ended the request at token 0 and tells decode itself."""
        return self._first_token is not None and bool(self._first_token.finish_reason)

    async def advance(self) -> None:
        """Waits for events and takes them all. Raises AttemptFailed, or what ends the request for good."""
        failure: AttemptFailed | None = None
        for arrival in await self._inbox.take():
            try:
                self._take(arrival)
            except AttemptFailed as failed:  # what came with it is good
                failure = failure or failed
        if failure is not None and self._delivery.finish_reason is None:
            raise failure

    async def wait_for_done(self) -> None:
        """Prefill's figures, if they come soon; the client's last message waits for nothing else."""
        try:
            async with asyncio.timeout(DONE_WAIT_S):
                while self.prefill is not None and not self._is_prefill_over:
                    for arrival in await self._inbox.take():
                        if arrival.source is self.prefill and isinstance(arrival.event, prefill_pb2.Done | Failed):
                            self._note_prefill_over(arrival.event)
        except TimeoutError:
            return

    def _take(self, arrival: Arrival) -> None:
        at, source, event = arrival
        match event:
            case prefill_pb2.Queued():
                self._is_prefill_computing = event.num_ahead == 0
            case prefill_pb2.Progress():
                self._is_prefill_computing = True
            case prefill_pb2.FirstToken():
                self._first_token, self._is_prefill_computing = event, False
                self._timeline.prefill_token_at = self._timeline.prefill_token_at or at
                self._delivery.add(0, [event.token], at)
            case prefill_pb2.Done() | Failed() if source is self.prefill:
                self._note_prefill_over(event)
            case decode_pb2.StreamTokens():
                self._take_tokens(source, event, at)
            case decode_pb2.Moved():
                self.move_failure = None if event.acked else event.failure or "refused"
            case decode_pb2.Leaving():
                self.is_leaving = True
            case _ if source is self.target:
                self.target, self.move_failure = None, "the stream's next worker could not take it"
            case _:
                self._take_end(event)

    def _take_tokens(self, source: Source, event: decode_pb2.StreamTokens, at: float) -> None:
        self.has_claim = True
        if source is self.target:
            self.decode, self.target, self.is_leaving = source, None, False
        self._delivery.add(event.index, event.tokens, at)
        if self._timeline.decode_token_at is None and event.index + len(event.tokens) > 1:
            self._timeline.decode_token_at = at

    def _take_end(self, event: Event) -> None:
        """Decode's word that it has the stream no longer, or not the blocks for it."""
        match event:
            case decode_pb2.TransferFailed():
                if self.has_claim or (self.number and event.attempt != self.number):
                    return  # about a writer that was fenced meanwhile
                role: Role = "decode" if event.reason == "fill_deadline" else "prefill"
                lost = TransferIncomplete(f"the prompt's blocks did not arrive: {event.reason}")
                raise AttemptFailed(role, lost, was_computing=False)
            case decode_pb2.StreamEnded():
                if self._delivery.finish_reason is None:
                    self._take_early_end(event)
            case Failed():
                was_computing = self.has_claim and not self.is_leaving
                raise AttemptFailed("decode", event.error, was_computing=was_computing, in_company=event.in_company)
            case _:
                raise AssertionError(f"{type(event).__name__} is not decode's to send")

    def _take_early_end(self, ended: decode_pb2.StreamEnded) -> None:
        """Decode ended the stream by itself, and not after the token that this router took for the last."""
        match finish_reason_from_proto(ended.finish_reason):
            case FinishReason.DEADLINE:
                raise DeadlinePassed("the request's deadline has passed")
            case FinishReason.ERROR:
                raise typed_error(ended.reason, ended.detail or "decode failed")
            case FinishReason.CANCELLED:
                gone = Draining(f"the decode worker ended the stream: {ended.detail}")
                raise AttemptFailed("decode", gone, was_computing=False)
            case _:
                raise DataLoss(f"decode ended the stream after {ended.num_tokens} tokens; the router saw no reason to")

    def _note_prefill_over(self, event: prefill_pb2.Done | Failed) -> None:
        self._is_prefill_over = True
        if isinstance(event, prefill_pb2.Done):
            self._timeline.done = event
            if event.acked or self.has_claim or self.needs_no_decode:
                return
            error: IsthmusError = TransferIncomplete(f"the prompt's blocks did not arrive: {event.failure}")
        elif self.has_claim:
            return
        else:
            error = event.error
        in_company = isinstance(event, Failed) and event.in_company
        raise AttemptFailed("prefill", error, was_computing=self._is_prefill_computing, in_company=in_company)
