"""What the events of one attempt mean: either source may fail while the other still finishes the request."""

import asyncio
from typing import Literal

from isthmus.errors import DataLoss, DeadlinePassed, IsthmusError, TransferIncomplete, WorkerLost
from isthmus.rpc_errors import typed_error
from isthmus.types import FinishReason
from isthmus.v1 import prefill_pb2
from router.delivery import Delivery, Timeline
from router.inbox import (
    DecodeEnded,
    DecodeFailed,
    DecodeTokens,
    Event,
    FirstToken,
    Inbox,
    PrefillDone,
    PrefillFailed,
)

CLAIM_WAIT_S = 1.0  # for decode's first word, once prefill failed with its token sent
DONE_WAIT_S = 1.0  # for prefill's figures, once everything else is there


class AttemptFailed(Exception):
    """This attempt is over; `error` says why and `failed` who failed."""

    def __init__(self, error: IsthmusError, failed: Literal["prefill", "decode", "transfer"]):
        super().__init__(error.detail)
        self.error = error
        self.failed: Literal["prefill", "decode", "transfer"] = failed


class Attempt:
    """Owned by the request's task; lives from placement to the end or failure of one attempt."""

    def __init__(self, inbox: Inbox, delivery: Delivery, timeline: Timeline):
        self._inbox = inbox
        self._delivery = delivery
        self._timeline = timeline
        self._has_claim = False  # decode reported a token: it has all blocks, prefill is needed no more
        self._first_token: prefill_pb2.FirstToken | None = None
        self._prefill_failure: IsthmusError | None = None
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
        if self._prefill_failure is None or self._has_claim:
            events = await self._inbox.take()
        else:
            events = await self._take_or_give_up(self._prefill_failure)
        for at, event in events:
            self._take(event, at)

    async def wait_for_done(self) -> None:
        """Prefill's figures, if they come soon; the client's last message waits for nothing else."""
        try:
            async with asyncio.timeout(DONE_WAIT_S):
                while not self._is_prefill_over:
                    for _, event in await self._inbox.take():
                        if isinstance(event, PrefillDone | PrefillFailed):
                            self._note_prefill_over(event)
        except TimeoutError:
            return

    async def _take_or_give_up(self, failure: IsthmusError) -> list[tuple[float, Event]]:
        """Prefill failed after its token: every block may be there already, and then decode says so at once."""
        try:
            async with asyncio.timeout(CLAIM_WAIT_S):
                return await self._inbox.take()
        except TimeoutError as waited:
            raise AttemptFailed(failure, "prefill") from waited

    def _take(self, event: Event, at: float) -> None:
        match event:
            case FirstToken(message):
                self._first_token = message
                self._timeline.prefill_token_at = at
                self._delivery.add(0, [message.token], at)
            case DecodeTokens(index, tokens):
                self._has_claim = True
                self._delivery.add(index, tokens, at)
                if self._timeline.decode_token_at is None and index + len(tokens) > 1:
                    self._timeline.decode_token_at = at
            case DecodeEnded():
                self._take_end(event)
            case DecodeFailed(error):
                failed = "transfer" if isinstance(error, TransferIncomplete) else "decode"
                raise AttemptFailed(error, failed)
            case PrefillDone() | PrefillFailed():
                self._note_prefill_over(event)
                self._check_prefill()

    def _take_end(self, event: DecodeEnded) -> None:
        """Decode ended the stream by itself; after the last token that is what this router found too."""
        if self._delivery.finish_reason is not None:
            return
        match event.finish_reason:
            case FinishReason.DEADLINE:
                raise DeadlinePassed("the request's deadline has passed")
            case FinishReason.ERROR:
                raise typed_error(event.reason, event.detail or "decode failed")
            case FinishReason.CANCELLED:
                raise AttemptFailed(WorkerLost(f"the decode worker ended the stream: {event.detail}"), "decode")
            case _:
                raise DataLoss(f"decode ended the stream after {event.num_tokens} tokens; the router saw no reason to")

    def _note_prefill_over(self, event: PrefillDone | PrefillFailed) -> None:
        self._is_prefill_over = True
        if isinstance(event, PrefillFailed):
            self._prefill_failure = event.error
            return
        self._timeline.done = event.message
        if not event.message.acked:
            self._prefill_failure = TransferIncomplete(f"the prompt's blocks did not arrive: {event.message.failure}")

    def _check_prefill(self) -> None:
        if self._prefill_failure is None or self._has_claim or self._delivery.finish_reason is not None:
            return
        if self._first_token is None:
            raise AttemptFailed(self._prefill_failure, "prefill")
