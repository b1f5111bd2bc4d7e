"""One generation over as many calls as it takes: what to ask next, what an answer or a failure means. No I/O."""

from isthmus.client.attempts import Attempts, Failure, Kind
from isthmus.client.generation import Chunk, Generation
from isthmus.convert import token_from_proto
from isthmus.errors import AttachedElsewhere, DataLoss, NumericsMismatch, WorkerLost
from isthmus.v1 import inference_pb2

NO_END = Failure(WorkerLost("the stream ended without its end"))


class OutOfOrder(Exception):
    """Tokens are missing, or these overlap those delivered: the stream is asked for again from where it stands."""


class Course:
    """Owned by the stream that makes the calls; `cancel` may come from any thread."""

    def __init__(self, request: inference_pb2.GenerateRequest, attempts: Attempts):
        self.generation = Generation(seed=request.sampling.seed)
        self.attempts = attempts
        self.live_id = ""  # the id under which a router may still hold the stream
        self.is_over = False
        self._request = request
        self._given = list(request.emitted_token_ids)
        self._is_resuming = False
        self._is_answered = False
        self._num_unanswered = 0  # Resume calls of ours that a router may still carry out

    def next_message(self) -> inference_pb2.GenerateRequest | inference_pb2.ResumeRequest:
        """Resume while somebody may hold the stream; else the same request with the tokens so far: the same bits."""
        self._is_resuming, self._is_answered = bool(self.live_id), False
        if self._is_resuming:
            return inference_pb2.ResumeRequest(request_id=self.live_id, next_index=self._next_index)
        del self._request.emitted_token_ids[:]
        self._request.emitted_token_ids.extend(self._given + self.generation.token_ids)
        return self._request

    def take(self, response: inference_pb2.GenerateResponse | inference_pb2.ResumeResponse) -> Chunk | None:
        """What is new in it. Raises OutOfOrder, or an IsthmusError that ends the generation."""
        self._is_answered = True
        match response.WhichOneof("event"):
            case "accepted":
                self._accepted(response.accepted)
            case "tokens":
                return self._tokens(response.tokens)
            case "finished":
                self.is_over, self.live_id = True, ""
                self.generation.finished = response.finished
                return self._deliver(Chunk(self._next_index, (), response.finished.text))
            case _:
                pass
        return None

    def failed(self, failure: Failure) -> float:
        """Seconds to wait before the next call. Raises what ends the generation."""
        try:
            return self._after(failure)
        except Exception:
            self.is_over, self.live_id = True, ""
            raise

    def cancel(self) -> bool:
        """True if this ends it: no call follows, and a router that holds the stream is to be told."""
        if self.is_over:
            return False
        self.is_over = self.generation.is_cancelled = True
        return True

    def _after(self, failure: Failure) -> float:
        kind = failure.kind()
        if kind is Kind.GONE and self._is_resuming:
            self.live_id = ""
            return 0.0
        if kind is Kind.REFUSED and not self._is_resuming and not self.generation.tokens:
            self.live_id = ""
            return self.attempts.refused(failure)
        self._num_unanswered += self._is_resuming and not self._is_answered and failure.is_transport
        # A router that froze with our Resume unread attaches the stream when it wakes: we are that other call.
        if isinstance(failure.error, AttachedElsewhere) and self._num_unanswered:
            self._num_unanswered -= 1
        elif kind in (Kind.FINAL, Kind.GONE):
            raise failure.error
        return self.attempts.broken(failure, may_give_up=self.generation.accepted is None)

    @property
    def _next_index(self) -> int:
        return len(self._given) + len(self.generation.tokens)

    def _accepted(self, accepted: inference_pb2.Accepted) -> None:
        generation = self.generation
        self.live_id = accepted.request_id
        if accepted.request_id != generation.request_id:
            generation.request_ids.append(accepted.request_id)
        if generation.accepted is None:
            generation.accepted = accepted
            return
        generation.num_resumes += 1
        if _differ(accepted, generation.accepted):
            raise NumericsMismatch("the stream broke, and no worker that computes the same bits is left")

    def _tokens(self, message: inference_pb2.TokenChunk) -> Chunk | None:
        tokens = tuple(token_from_proto(token) for token in message.tokens)
        position, end = self._next_index, message.index + len(tokens)
        if message.index > position or message.index < position < end:
            raise OutOfOrder(f"tokens [{message.index}, {end}) after {position} tokens")
        if message.index < position:
            self._check_repeated(message)
            return None
        self.attempts.progressed()
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
    """Empty digests are those of a call that had nothing left to compute."""
    digests = ((getattr(one, name), getattr(other, name)) for name in ("model_digest", "numerics_digest"))
    return any(a and b and a != b for a, b in digests)
