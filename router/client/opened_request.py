"""A request as its router holds it: what was asked, what its client has got and gets next, and how long all of it took.

Opened from what a client sent, or from a decode worker's record of a stream. Text and end are pure functions of request
and tokens, however these are grouped.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from isthmus.convert import finish_reason_to_proto, request_from_proto
from isthmus.errors import InvalidRequest, IsthmusError
from isthmus.ids import Ids
from isthmus.ledger import Ledger
from isthmus.metrics import RequestMetrics
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.finish import finish_reason
from isthmus.text.token_merge import TokenMerge
from isthmus.types import FinishReason, Request
from isthmus.v1 import decode_pb2, inference_pb2, prefill_pb2, types_pb2
from router.client.caller import ClientGone
from router.client.validate import ModelFacts, complete_sampling, retention_s
from router.pool.decode_stream import DecodeStream
from router.pool.policy import NumericsClass


class DetokenizerMaker(Protocol):
    """`Tokenizer.detokenizer`."""

    def __call__(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> Detokenizer: ...


class Delivery:
    """Merged tokens, their text and why they ended. Written by its own methods, called from the request's routine."""

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
        self._pending: list[types_pb2.Token] = []  # not yet taken
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
        chunk = inference_pb2.TokenChunk(
            index=self.num_tokens - len(self._pending), tokens=self._pending, text=self._pending_text
        )
        self._pending = []
        self._pending_text = ""
        return chunk

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
            self.finish_reason = FinishReason.STOP
            self.is_cut_by_text = True

    def _shows(self, stop_token_id: int) -> bool:
        """Whether the token that ended the stream is text: a stop token the client named and wants to see."""
        sampling = self._request.sampling
        return sampling.include_stop and stop_token_id in sampling.stop_token_ids


@dataclass(slots=True)
class RequestTimes:
    """Moments on the router's clock, in seconds. Written by the request's routine, by way of `OpenedRequest`."""

    received_at: float
    placed_at: float | None = None
    first_sent_at: float | None = None
    prefill_token_at: float | None = None  # token 0 from prefill
    decode_token_at: float | None = None  # token 1, the first that decode computed
    done: prefill_pb2.Done = field(default_factory=prefill_pb2.Done)

    def note_placed(self, at: float) -> None:
        self.placed_at = at if self.placed_at is None else self.placed_at

    def note_sent(self, at: float) -> None:
        self.first_sent_at = at if self.first_sent_at is None else self.first_sent_at

    def note_prefill_token(self, at: float) -> None:
        self.prefill_token_at = at if self.prefill_token_at is None else self.prefill_token_at

    def note_decode_token(self, at: float) -> None:
        self.decode_token_at = at if self.decode_token_at is None else self.decode_token_at

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


@dataclass(eq=False, slots=True)
class OpenedRequest:
    """From validation to the last message. Written by its request's routine: the life and its attempts."""

    request: Request
    client_request_id: str
    delivery: Delivery
    times: RequestTimes
    deadline: float  # on the router's clock
    retention_s: int = 0  # 0: the request ends with its client
    counter: int = 0  # of the latest attach
    num_attempts: int = 0
    num_cached_tokens: int = 0
    stream: DecodeStream | None = None  # while decode has it
    served_by: inference_pb2.ServedBy = field(default_factory=inference_pb2.ServedBy)

    @property
    def remaining_request(self) -> Request:
        """For another worker: what the client has is not generated again but replayed."""
        return replace(self.request, emitted_token_ids=tuple(self.delivery.token_ids))

    def accepted(self, numerics: NumericsClass) -> inference_pb2.GenerateResponse:
        return inference_pb2.GenerateResponse(
            accepted=inference_pb2.Accepted(
                request_id=self.request.request_id,
                client_request_id=self.client_request_id,
                seed=self.request.seed,
                model_digest=numerics.model_digest,
                numerics_digest=numerics.numerics_digest,
                num_prompt_tokens=len(self.request.prompt_token_ids),
            )
        )

    def finished(self, now: float) -> inference_pb2.GenerateResponse:
        """The last message; of a request ended by a Cancel call too."""
        delivery = self.delivery
        if delivery.num_tokens <= 1:
            self.served_by.decode = ""  # prefill alone served it
        finished = inference_pb2.Finished(
            finish_reason=finish_reason_to_proto(delivery.finish_reason or FinishReason.CANCELLED),
            usage=inference_pb2.Usage(
                num_prompt_tokens=len(self.request.prompt_token_ids),
                num_cached_tokens=self.num_cached_tokens,
                num_generated_tokens=delivery.num_tokens,
            ),
            timings=self.times.timings(delivery.arrived_at, now),
            workers=self.served_by,
            num_attempts=self.num_attempts,
            text=delivery.held_text(),
        )
        return inference_pb2.GenerateResponse(finished=finished)

    def record(self, ledger: Ledger, event: str, *, cause: str = "", transfer_id: str = "", **fields: object) -> None:
        ledger.record(
            event,
            request_id=self.request.request_id,
            transfer_id=transfer_id,
            attempt=self.num_attempts,
            cause=cause,
            **fields,
        )


@dataclass(frozen=True, slots=True)
class RequestOpener:
    """Opens requests; `detokenizer(stop, include_stop=…)` makes the detokenizer of one."""

    model: ModelFacts
    detokenizer: DetokenizerMaker
    ids: Ids

    def open(
        self, message: inference_pb2.GenerateRequest, token_ids: Sequence[int], received_at: float, timeout_s: float
    ) -> OpenedRequest:
        """From a checked message and its prompt's token ids. Raises InvalidRequest before anything is held."""
        field_name = message.WhichOneof("input") or "prompt"
        sampling = complete_sampling(message.sampling, len(token_ids), self.model, prompt_field=field_name)
        request = Request(
            request_id=self.ids.request_id(),
            seed=message.sampling.seed if message.sampling.HasField("seed") else self.ids.seed(),
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
            eos_token_ids=self.model.eos_token_ids,
            tenant=message.tenant,
            priority=message.priority,
        )
        opened = self._opened(request, message.emitted_token_ids, received_at, timeout_s)
        opened.client_request_id = message.client_request_id
        opened.retention_s = retention_s(message)
        return opened

    def reopen(
        self, attached: decode_pb2.Attached, next_index: int, received_at: float, timeout_s: float
    ) -> OpenedRequest:
        """Of a stream that was attached: its decode worker's record says the rest."""
        request = request_from_proto(attached.request)
        opened = self._opened(request, request.emitted_token_ids[:next_index], received_at, timeout_s)
        opened.retention_s = attached.retention_s
        opened.counter = attached.attach.counter
        return opened

    def _opened(
        self, request: Request, emitted_token_ids: Sequence[int], received_at: float, timeout_s: float
    ) -> OpenedRequest:
        detokenizer = self.detokenizer(request.sampling.stop, include_stop=request.sampling.include_stop)
        delivery = Delivery(request, self.model.context_length, detokenizer)
        delivery.restore(emitted_token_ids)
        return OpenedRequest(request, "", delivery, RequestTimes(received_at), received_at + timeout_s)


def count_request(metrics: RequestMetrics, opened: OpenedRequest | None, error: BaseException | None) -> None:
    """Once a request, when it ends; labels come from fixed sets. `opened` is None for what was refused before."""
    metrics.requests.labels(_outcome(opened, error)).inc()
    if opened is None:
        return
    arrived_at = opened.delivery.arrived_at
    metrics.tokens.labels("prompt").inc(len(opened.request.prompt_token_ids))
    metrics.tokens.labels("cached").inc(opened.num_cached_tokens)
    metrics.tokens.labels("generated").inc(len(arrived_at))
    if (first_sent_at := opened.times.first_sent_at) is not None:
        metrics.ttft_s.observe(first_sent_at - opened.times.received_at)
    for before, after in itertools.pairwise(arrived_at):
        metrics.itl_s.observe(after - before)


def _outcome(opened: OpenedRequest | None, error: BaseException | None) -> str:
    if error is None:
        reason = opened.delivery.finish_reason if opened is not None else None
        return reason.value if reason is not None else "finished"
    if isinstance(error, ClientGone):
        return "client_gone"
    return error.reason.lower() if isinstance(error, IsthmusError) else "internal"


def _span_ms(start: float | None, end: float | None) -> float:
    return 0.0 if start is None or end is None else max(0.0, 1000 * (end - start))


def _quantile(ordered: Sequence[float], fraction: float) -> float:
    """Nearest rank; 0 for nothing."""
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0
