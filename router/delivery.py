"""What one client has got and gets next: merged tokens, their text, why they ended, and how long everything took."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from isthmus.errors import InvalidRequest
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.finish import finish_reason
from isthmus.types import FinishReason, Request
from isthmus.v1 import inference_pb2, prefill_pb2, types_pb2
from router.merge import TokenMerge


class Delivery:
    """Owned by the request's task. Text and end are pure functions of request and tokens, however these are grouped."""

    def __init__(self, request: Request, context_length: int, detokenizer: Detokenizer):
        self._request = request
        self._context_length = context_length
        self._detokenizer = detokenizer
        self._merge: TokenMerge[types_pb2.Token] = TokenMerge(
            request.sampling.max_tokens,
            id_of=lambda token: token.id,
            identity=lambda token: (token.id, token.logprob),
        )
        self.token_ids: list[int] = []  # of the whole stream, what earlier calls delivered included
        self._pending: list[types_pb2.Token] = []
        self._pending_text = ""
        self.finish_reason: FinishReason | None = None
        self.is_cut_by_text = False  # a stop string ended it: only the router knows
        self.arrived_at: list[float] = []  # one per token of this call

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def restore(self, token_ids: Sequence[int]) -> None:
        """Tokens that an earlier call delivered. Raises InvalidRequest when one before the last ends the request."""
        for index, token_id in enumerate(token_ids):
            if self.finish_reason is not None:
                given = f"{len(token_ids)} tokens of which number {index - 1} ends the request"
                raise InvalidRequest.of("emitted_token_ids", given, "tokens as they were streamed, none behind an end")
            self._merge.know(token_id)
            self._follow(token_id)
        self._pending_text = ""

    def add(self, index: int, tokens: Sequence[types_pb2.Token], at: float) -> None:
        """Raises DataLoss when a copy differs from what was delivered."""
        for token in self._merge.add(index, tokens):
            if self.finish_reason is None:  # tokens behind a stop string are not the client's
                self._deliver(token, at)

    def take_chunk(self) -> inference_pb2.TokenChunk | None:
        """Everything not yet taken, as one message."""
        if not self._pending:
            return None
        tokens, self._pending = self._pending, []
        text, self._pending_text = self._pending_text, ""
        return inference_pb2.TokenChunk(index=self.num_tokens - len(tokens), tokens=tokens, text=text)

    def held_text(self) -> str:
        """The text that only the end releases. Once."""
        return self._pending_text + self._detokenizer.finish()

    def _deliver(self, token: types_pb2.Token, at: float) -> None:
        self._pending.append(token)
        self.arrived_at.append(at)
        self._follow(token.id)

    def _follow(self, token_id: int) -> None:
        """Text and end, one token further."""
        self.token_ids.append(token_id)
        self.finish_reason = finish_reason(self._request, self.token_ids, self._context_length)
        if self.finish_reason is FinishReason.STOP and not self._shows(token_id):
            return
        released = self._detokenizer.push(token_id)
        self._pending_text += released.text
        if released.stopped:
            self.finish_reason, self.is_cut_by_text = FinishReason.STOP, True

    def _shows(self, stop_token_id: int) -> bool:
        """Whether the token that ended the stream is text: a stop token the client named and wants to see."""
        sampling = self._request.sampling
        return sampling.include_stop and stop_token_id in sampling.stop_token_ids


@dataclass(slots=True)
class Timeline:
    """Moments on the router's clock, in seconds. Owned by the request's task."""

    received_at: float
    placed_at: float | None = None
    first_sent_at: float | None = None
    prefill_token_at: float | None = None  # token 0 from prefill
    decode_token_at: float | None = None  # token 1, the first that decode computed
    done: prefill_pb2.Done = field(default_factory=prefill_pb2.Done)

    def timings(self, arrived_at: Sequence[float], now: float) -> inference_pb2.Timings:
        gaps = sorted(after - before for before, after in itertools.pairwise(arrived_at))
        return inference_pb2.Timings(
            queue_ms=_span_ms(self.received_at, self.placed_at),
            ttft_ms=_span_ms(self.received_at, self.first_sent_at),
            total_ms=_span_ms(self.received_at, now),
            itl_p50_ms=1000 * _quantile(gaps, 0.5),
            itl_p99_ms=1000 * _quantile(gaps, 0.99),
            prefill_ms=self.done.prefill_ms,
            transfer_exposed_ms=self.done.transfer_exposed_ms,
            handoff_ms=_span_ms(self.prefill_token_at, self.decode_token_at),
            transfer_bytes=self.done.transfer_bytes,
            transfer_blocks=self.done.transfer_blocks,
            transfer_frames=self.done.transfer_frames,
        )


def _span_ms(start: float | None, end: float | None) -> float:
    return 0.0 if start is None or end is None else max(0.0, 1000 * (end - start))


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    """Nearest rank; 0 for nothing."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0
