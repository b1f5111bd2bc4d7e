"""One Generate or Resume call: the request, its client and what has happened to it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from isthmus.convert import finish_reason_to_proto
from isthmus.ledger import Ledger
from isthmus.types import FinishReason, Request
from isthmus.v1 import inference_pb2
from router.decode_stream import DecodeStream
from router.delivery import Delivery, Timeline
from router.interrupt import Interruptible
from router.policy import NumericsClass

Write = Callable[[inference_pb2.GenerateResponse], Awaitable[None]]


@dataclass(eq=False, slots=True)
class Call:
    """Owned by the call's task."""

    request: Request
    client_request_id: str
    delivery: Delivery
    timeline: Timeline
    life: Interruptible
    deadline: float
    write: Write
    retention_s: int = 0  # 0: the request ends with its client
    is_attended: bool = True  # the client is still there
    counter: int = 0  # of the latest attach
    num_attempts: int = 0
    num_cached_tokens: int = 0
    stream: DecodeStream | None = None  # while decode has it
    lost_at: float | None = None  # a worker was lost, and no token has come since
    served_by: inference_pb2.ServedBy = field(default_factory=inference_pb2.ServedBy)

    @property
    def remaining_request(self) -> Request:
        """For another worker: what the client has is not generated again but replayed."""
        return replace(self.request, emitted_token_ids=tuple(self.delivery.token_ids))

    @property
    def is_handed_over(self) -> bool:
        """Decode runs it by itself and keeps it for whoever resumes it."""
        return bool(self.retention_s) and self.stream is not None and self.stream.is_claimed

    async def flush(self, now: Callable[[], float]) -> None:
        """Sends what has come since the last message, if anything has."""
        if chunk := self.delivery.take_chunk():
            await self.write(inference_pb2.GenerateResponse(tokens=chunk))
            if self.timeline.first_sent_at is None:
                self.timeline.first_sent_at = now()

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
            timings=self.timeline.timings(delivery.arrived_at, now),
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
