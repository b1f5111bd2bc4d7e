"""What the events of one attempt mean: either source may fail while the other still finishes the request."""

import asyncio

from isthmus.convert import finish_reason_from_proto
from isthmus.errors import DataLoss, DeadlinePassed, TransferIncomplete, WorkerLost
from isthmus.rpc_errors import typed_error
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, prefill_pb2
from router.delivery import Delivery, Timeline
from router.inbox import Event, Failed, Inbox

CLAIM_WAIT_S = 1.0  # for decode's first word, once prefill failed with its token sent
DONE_WAIT_S = 1.0  # for prefill's figures, once everything else is there


class AttemptFailed(Exception):
    """This attempt is over; `cause` says who failed and why."""

    def __init__(self, cause: Failed):
        super().__init__(cause.error.detail)
        self.cause = cause


class Attempt:
    """Owned by the request's task; lives from placement to the end or failure of one attempt."""

    def __init__(self, inbox: Inbox, delivery: Delivery, timeline: Timeline):
        self._inbox = inbox
        self._delivery = delivery
        self._timeline = timeline
        self._has_claim = False  # decode reported a token: it has all blocks, prefill is needed no more
        self._first_token: prefill_pb2.FirstToken | None = None
        self._prefill_failure: Failed | None = None
        self._is_prefill_over = False

    @property
    def num_cached_tokens(self) -> int:
        return self._first_token.num_cached_tokens if self._first_token else 0

    @property
    def needs_no_decode(self) -> bool:
        """Prefill ended the request at token 0 and tells decode itself."""
        return self._first_token is not None and bool(self._first_token.finish_reason)

    async def advance(self) -> None:
        """Waits for events and takes them all. Raises AttemptFailed, or what ends the request for good."""
        # Prefill failed after its token: every block may be there already, and then decode says so at once.
        failure = None if self._has_claim else self._prefill_failure
        try:
            async with asyncio.timeout(CLAIM_WAIT_S if failure else None):
                events = await self._inbox.take()
        except TimeoutError as waited:
            assert failure is not None, "otherwise there is no bound"
            raise AttemptFailed(failure) from waited
        for at, event in events:
            self._take(event, at)

    async def wait_for_done(self) -> None:
        """Prefill's figures, if they come soon; the client's last message waits for nothing else."""
        try:
            async with asyncio.timeout(DONE_WAIT_S):
                while not self._is_prefill_over:
                    for _, event in await self._inbox.take():
                        match event:
                            case prefill_pb2.Done() | Failed(source="prefill"):
                                self._note_prefill_over(event)
                            case _:
                                pass
        except TimeoutError:
            return

    def _take(self, event: Event, at: float) -> None:
        match event:
            case prefill_pb2.FirstToken():
                self._first_token = event
                self._timeline.prefill_token_at = at
                self._delivery.add(0, [event.token], at)
            case decode_pb2.StreamTokens():
                self._has_claim = True
                self._delivery.add(event.index, event.tokens, at)
                if self._timeline.decode_token_at is None and event.index + len(event.tokens) > 1:
                    self._timeline.decode_token_at = at
            case decode_pb2.StreamEnded():
                if self._delivery.finish_reason is None:
                    self._take_early_end(event)
            case Failed(source="prefill") | prefill_pb2.Done():
                self._note_prefill_over(event)
                has_all = self._has_claim or self._delivery.finish_reason is not None
                if self._prefill_failure is not None and self._first_token is None and not has_all:
                    raise AttemptFailed(self._prefill_failure)
            case Failed():
                raise AttemptFailed(event)

    def _take_early_end(self, ended: decode_pb2.StreamEnded) -> None:
        """Decode ended the stream by itself, and not after the token that this router took for the last."""
        match finish_reason_from_proto(ended.finish_reason):
            case FinishReason.DEADLINE:
                raise DeadlinePassed("the request's deadline has passed")
            case FinishReason.ERROR:
                raise typed_error(ended.reason, ended.detail or "decode failed")
            case FinishReason.CANCELLED:
                lost = WorkerLost(f"the decode worker ended the stream: {ended.detail}")
                raise AttemptFailed(Failed("decode", lost))
            case _:
                raise DataLoss(f"decode ended the stream after {ended.num_tokens} tokens; the router saw no reason to")

    def _note_prefill_over(self, event: prefill_pb2.Done | Failed) -> None:
        self._is_prefill_over = True
        if isinstance(event, Failed):
            self._prefill_failure = event
            return
        self._timeline.done = event
        if not event.acked:
            incomplete = TransferIncomplete(f"the prompt's blocks did not arrive: {event.failure}")
            self._prefill_failure = Failed("prefill", incomplete)
