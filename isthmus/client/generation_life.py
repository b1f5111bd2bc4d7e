"""One generation over as many calls as it takes: what to do next, and what an answer or a failure means.

No I/O; the time is passed in. A driver carries out the steps and reports what came of them:

    while (step := life.next_step(now)) is not None:
        RouterCall: make the call          -> nothing to report
        ReadResponse: wait for a response  -> life.received(response, now), or life.call_ended(failure, now)
        DropCall: let the call go          -> nothing to report
        Pause: wait, or until it is cancelled
"""

from collections import deque
from dataclasses import dataclass
from typing import TypeAlias

from isthmus.client.cancellation import Cancellation
from isthmus.client.failure import CallFailure, FailureKind
from isthmus.client.generation import Chunk, Generation
from isthmus.client.retries import Retries
from isthmus.client.router_call import RouterCall
from isthmus.convert import token_from_proto
from isthmus.errors import AttachedElsewhere, DataLoss, NumericsMismatch, WorkerLost
from isthmus.v1 import inference_pb2

ID_TIMEOUT_S = 1.0  # an id on its way when the caller leaves is waited for: without it nobody can end the request
_NO_END = CallFailure.told(WorkerLost("the stream ended without its end"))


@dataclass(frozen=True, slots=True)
class ReadResponse:
    """Wait for the next response of the open call."""


@dataclass(frozen=True, slots=True)
class DropCall:
    """The call is over, or of no more use."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait before the next call, but no longer once the generation is cancelled."""

    seconds: float


Step: TypeAlias = RouterCall | ReadResponse | DropCall | Pause


class TokensOutOfOrder(Exception):
    """Tokens are missing, or these overlap those delivered: the stream is asked for again from where it stands."""


class GenerationLife:
    """The course of one generation. Written by its stream, which is its driver."""

    def __init__(self, request: inference_pb2.GenerateRequest, retries: Retries):
        self.generation = Generation(seed=request.sampling.seed)
        self._request = request
        self._retries = retries
        self._given = list(request.emitted_token_ids)
        self._steps: deque[Step] = deque()  # to be done before the next call
        self._live_id = ""  # the id under which a router may still hold the stream
        self._is_over = False
        self._is_call_open = False
        self._is_resuming = False
        self._is_answered = False  # the open call brought a response
        self._num_unanswered = 0  # Resume calls of ours that a router may still carry out

    @property
    def awaits_id(self) -> bool:
        """A call is open whose router has not told the request's id."""
        return self._is_call_open and not self._live_id

    def next_step(self, now: float) -> Step | None:
        """What the driver does next; None: nothing more. Raises DeadlinePassed.

        A call that is open is read to its end even after the generation was cancelled: what was made before is
        delivered.
        """
        if self._steps:
            return self._steps.popleft()
        if self._is_call_open:
            return ReadResponse()
        if self._is_over:
            return None
        return self._next_call(now)

    def received(
        self, response: inference_pb2.GenerateResponse | inference_pb2.ResumeResponse | None, now: float
    ) -> Chunk | None:
        """What is new in a response; None as `response`: the call ended without an error.

        Raises an IsthmusError that ends the generation; its router is then still to be told.
        """
        if response is None:
            self.call_ended(_NO_END, now)
            return None
        self._is_answered = True
        try:
            return self._take(response)
        except TokensOutOfOrder as error:
            self.call_ended(CallFailure.told(WorkerLost(str(error))), now)
            return None

    def call_ended(self, failure: CallFailure, now: float) -> None:
        """The open call failed. Raises what ends the generation."""
        self._is_call_open = False
        self._steps.append(DropCall())
        if self._is_over:
            return
        try:
            delay_s = self._after(failure, now)
        except Exception:
            self._end()
            raise
        if delay_s > 0:
            self._steps.append(Pause(delay_s))

    def cancel(self) -> bool:
        """True if this ends it: no call follows, and a router that holds the stream is to be told."""
        if self._is_over:
            return False
        self._is_over = True
        self.generation.is_cancelled = True
        return True

    def cancellation(self, now: float) -> Cancellation:
        """Tells the routers that the generation was cancelled, as far as they know it."""
        return Cancellation(self._live_id, self._retries.addresses, now)

    def _next_call(self, now: float) -> RouterCall:
        """Resume while somebody may hold the stream; else the same request with the tokens so far: the same bits."""
        self._is_resuming = bool(self._live_id)
        self._is_answered = False
        timeout_s = self._retries.remaining_s(now)
        self._is_call_open = True
        address = self._retries.router.address
        if self._is_resuming:
            resume = inference_pb2.ResumeRequest(request_id=self._live_id, next_index=self._next_index)
            return RouterCall(address, "Resume", resume, timeout_s)
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        request.emitted_token_ids.extend(self.generation.token_ids)
        return RouterCall(address, "Generate", request, timeout_s)

    def _take(self, response: inference_pb2.GenerateResponse | inference_pb2.ResumeResponse) -> Chunk | None:
        match response.WhichOneof("event"):
            case "accepted":
                self._accepted(response.accepted)
            case "tokens":
                return self._tokens(response.tokens)
            case "finished":
                self._end()
                self.generation.finished = response.finished
                return self._deliver(Chunk(self._next_index, (), response.finished.text))
            case _:
                pass
        return None

    def _end(self) -> None:
        self._is_over = True
        self._live_id = ""

    def _after(self, failure: CallFailure, now: float) -> float:
        """The seconds to wait before the next call. Raises what ends the generation."""
        if failure.kind is FailureKind.GONE and self._is_resuming:
            self._live_id = ""
            return 0.0
        if failure.kind is FailureKind.REFUSED and not self._is_resuming and not self.generation.tokens:
            self._live_id = ""
            return self._retries.refused(failure, now)
        if self._is_resuming and not self._is_answered and failure.is_connection_lost:
            self._num_unanswered += 1
        # A router that froze with our Resume unread attaches the stream when it wakes: we are that other call.
        if isinstance(failure.error, AttachedElsewhere) and self._num_unanswered:
            self._num_unanswered -= 1
        elif failure.kind in (FailureKind.FINAL, FailureKind.GONE):
            raise failure.error
        return self._retries.broken(failure, now, may_give_up=self.generation.accepted is None)

    @property
    def _next_index(self) -> int:
        return len(self._given) + len(self.generation.tokens)

    def _accepted(self, accepted: inference_pb2.Accepted) -> None:
        generation = self.generation
        self._live_id = accepted.request_id
        if accepted.request_id != generation.request_id:
            generation.request_ids.append(accepted.request_id)
        if generation.accepted is None:
            generation.accepted = accepted
            return
        generation.num_resumes += 1
        if _differ(accepted, generation.accepted):
            raise NumericsMismatch("the stream broke, and no worker that computes the same bits is left")

    def _tokens(self, message: inference_pb2.TokenChunk) -> Chunk | None:
        position = self._next_index
        end = message.index + len(message.tokens)
        if message.index > position or message.index < position < end:
            raise TokensOutOfOrder(f"tokens [{message.index}, {end}) after {position} tokens")
        if message.index < position:
            self._check_repeated(message)
            return None
        self._retries.progressed()
        tokens = tuple(token_from_proto(token) for token in message.tokens)
        return self._deliver(Chunk(message.index, tokens, message.text))

    def _check_repeated(self, message: inference_pb2.TokenChunk) -> None:
        known = self._given + self.generation.token_ids
        if known[message.index : message.index + len(message.tokens)] != [token.id for token in message.tokens]:
            raise DataLoss(f"token {message.index} or one after it came again and differs")

    def _deliver(self, chunk: Chunk) -> Chunk | None:
        self.generation.tokens.extend(chunk.tokens)
        self.generation.text += chunk.text
        return chunk if chunk.tokens or chunk.text else None


def _differ(one: inference_pb2.Accepted, other: inference_pb2.Accepted) -> bool:
    """Whether two calls had different bits. A call that had nothing to compute has empty digests."""
    for name in ("model_digest", "numerics_digest"):
        ours = getattr(one, name)
        theirs = getattr(other, name)
        if ours and theirs and ours != theirs:
            return True
    return False
