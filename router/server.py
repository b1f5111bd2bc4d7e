"""The public gRPC face. Large requests arrive as raw bytes, so that their bounds are checked before they are parsed."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from isthmus.clock import Clock
from isthmus.config import RouterConfig
from isthmus.errors import (
    AttachedElsewhere,
    Draining,
    InvalidRequest,
    IsthmusError,
    RequestCancelled,
    WorkersUnavailable,
)
from isthmus.metrics import Metrics
from isthmus.process.serving import until_none_left
from isthmus.text.workers import TextWorkers
from isthmus.v1 import inference_pb2, inference_pb2_grpc
from router.attendance import Attendance, Context
from router.call import Call
from router.dispatch import Dispatch
from router.interrupt import Interruptible
from router.locate import Locator
from router.open_call import CallOpener, encode
from router.validate import ModelFacts, check_model, check_resume, check_token_ids

SERVICE = "isthmus.v1.InferenceService"
_SLACK_BYTES = 4096  # a message around a prompt of the allowed size
MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class Backend:
    """What the server hands requests to."""

    dispatch: Dispatch
    locator: Locator
    model: ModelFacts
    text: TextWorkers
    metrics: Metrics
    clock: Clock


class InferenceServer(inference_pb2_grpc.InferenceServiceServicer):
    """Event loop only. Owns the lives of running calls, for Cancel and drain. `backend` is None at first."""

    def __init__(self, config: RouterConfig):
        self._config = config
        self._attended: dict[str, Attendance] = {}  # by request, those whose client has left included
        self._is_draining = False
        self.backend: Backend | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Every method in one table, added once: which of two handlers of one method wins differs between grpcio's
        releases. Methods that may carry a prompt take raw bytes, whose bounds are checked before they are parsed."""
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(self.Generate, None, _serialise),
            "Tokenize": grpc.unary_unary_rpc_method_handler(self.Tokenize, None, _serialise),
            "Detokenize": grpc.unary_unary_rpc_method_handler(self.Detokenize, None, _serialise),
            "Resume": grpc.unary_stream_rpc_method_handler(
                self.Resume, inference_pb2.ResumeRequest.FromString, _serialise
            ),
            "Cancel": grpc.unary_unary_rpc_method_handler(
                self.Cancel, inference_pb2.CancelRequest.FromString, _serialise
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                self.ListModels, inference_pb2.ListModelsRequest.FromString, _serialise
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    @property
    def num_streams(self) -> int:
        return len(self._attended)

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests at once, hands kept streams on, waits for the others; what is left at the end."""
        self._is_draining = True
        return await until_none_left(self._hand_on, timeout_s)

    def _hand_on(self) -> int:
        """Streams that decode keeps go on there until another router resumes them."""
        for attendance in list(self._attended.values()):
            if attendance.call is not None and attendance.call.is_handed_over:
                attendance.hand_on(Draining("this router drains; resume at another", retry_after_s=0.05))
        return self.num_streams

    async def Generate(self, request: bytes, context: Context) -> None:  # noqa: N802 - named by the protocol
        """Writes to the context itself, so that cancelling the call cancels whatever the request waits for."""
        backend = self._backend_for_work()
        attendance = Attendance(context, backend.clock.now(), self._timeout_s(context))

        async def serve() -> None:
            call = await CallOpener(backend.model, backend.text).generate(request, attendance, self._config)
            await self._serve(attendance, call, lambda: backend.dispatch.serve(call))

        await attendance.through(self._living(backend, attendance, serve))

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Context) -> None:  # noqa: N802
        backend = self._backend_for_work()
        check_resume(request)
        attendance = Attendance(context, backend.clock.now(), self._timeout_s(context), _as_resume)

        async def serve() -> None:
            source = backend.dispatch.source(attendance.life)
            place = await backend.locator.attach(request.request_id, request.next_index, source)
            call = CallOpener(backend.model, backend.text).resume(place, request.next_index, attendance)
            await self._serve(attendance, call, lambda: backend.dispatch.resume(call, place))

        await attendance.through(self._living(backend, attendance, serve))

    async def Cancel(  # noqa: N802
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """The cancelled call ends with `finished`, reason CANCELLED, and what it had so far."""
        attendance = self._attended.get(request.request_id)
        if attendance is not None:
            attendance.life.interrupt(RequestCancelled("cancelled by a Cancel call"))
            return inference_pb2.CancelResponse(found=True)
        return inference_pb2.CancelResponse(found=await self._started().locator.cancel(request.request_id))

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Context
    ) -> inference_pb2.ListModelsResponse:
        model = self._started().model
        shown = inference_pb2.Model(
            id=model.model_id,
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            digest=model.digest,
        )
        return inference_pb2.ListModelsResponse(models=[shown])

    async def Tokenize(self, request: bytes, context: Context) -> inference_pb2.TokenizeResponse:  # noqa: N802
        backend = self._started()
        message = self._parse(request, inference_pb2.TokenizeRequest, "prompt")
        check_model(message.model, backend.model)
        async with Interruptible(self._timeout_s(context)):
            token_ids = await encode(backend.text, message)
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: bytes, context: Context) -> inference_pb2.DetokenizeResponse:  # noqa: N802
        backend = self._started()
        message = self._parse(request, inference_pb2.DetokenizeRequest, "token_ids")
        check_model(message.model, backend.model)
        check_token_ids("token_ids", message.token_ids, backend.model.vocab_size, may_be_empty=True)
        async with Interruptible(self._timeout_s(context)):
            return inference_pb2.DetokenizeResponse(text=await backend.text.decode(message.token_ids))

    async def _living(self, backend: Backend, attendance: Attendance, serve: Callable[[], Awaitable[None]]) -> None:
        """From the first byte to the last; how it ended is counted once."""
        outcome = "internal"
        try:
            async with attendance.life:
                await serve()
            outcome = "finished"
        except IsthmusError as error:
            outcome = error.reason.lower()
            if not isinstance(error, RequestCancelled) or attendance.call is None or not attendance.can_say_more:
                raise
            await attendance.write(backend.dispatch.finished(attendance.call))
        except asyncio.CancelledError:
            outcome = "client_gone"
            raise
        finally:
            _count(backend.metrics, attendance.call, outcome)

    async def _serve(self, attendance: Attendance, call: Call, work: Callable[[], Awaitable[None]]) -> None:
        attendance.call = call
        request_id = call.request.request_id
        if (before := self._attended.get(request_id)) is not None:
            before.life.interrupt(AttachedElsewhere("another call took the stream over"))
        self._attended[request_id] = attendance
        try:
            await work()
        finally:
            if self._attended.get(request_id) is attendance:  # else resumed here by another call
                del self._attended[request_id]

    def _started(self) -> Backend:
        if self.backend is None:
            raise WorkersUnavailable("the router is starting", retry_after_s=1.0)
        return self.backend

    def _backend_for_work(self) -> Backend:
        if self._is_draining:
            raise Draining("the router is draining", retry_after_s=1.0)
        return self._started()

    def _timeout_s(self, context: Context) -> float:
        """The client's remaining time, within the server's bounds."""
        remaining_s = cast("float | None", context.time_remaining())  # None without a deadline
        if remaining_s is None:
            return self._config.default_timeout_s
        return min(remaining_s, self._config.max_timeout_s)

    def _parse(self, raw: bytes, message_class: type[MessageT], field: str) -> MessageT:
        """For the small calls: bounded by the bytes a prompt may have."""
        if len(raw) > self._config.max_prompt_bytes + _SLACK_BYTES:
            raise InvalidRequest.of(field, f"{len(raw)} bytes", f"at most {self._config.max_prompt_bytes} bytes")
        try:
            return message_class.FromString(raw)
        except DecodeError as error:
            raise InvalidRequest.of("request", "bytes that cannot be read", "a serialised request") from error


def _serialise(message: Message) -> bytes:
    return message.SerializeToString()


def _as_resume(response: inference_pb2.GenerateResponse) -> inference_pb2.ResumeResponse:
    kind = response.WhichOneof("event")
    assert kind is not None, "every message says something"
    return inference_pb2.ResumeResponse(**{kind: getattr(response, kind)})


def _count(metrics: Metrics, call: Call | None, outcome: str) -> None:
    """Once a call; labels come from fixed sets."""
    reason = call.delivery.finish_reason if call else None
    metrics.requests.labels(reason.value if outcome == "finished" and reason else outcome).inc()
    if call is None:
        return
    metrics.tokens.labels("prompt").inc(len(call.request.prompt_token_ids))
    metrics.tokens.labels("cached").inc(call.num_cached_tokens)
    metrics.tokens.labels("generated").inc(len(call.delivery.arrived_at))
    if (first_sent_at := call.timeline.first_sent_at) is not None:
        metrics.ttft_s.observe(first_sent_at - call.timeline.received_at)
    for before, after in itertools.pairwise(call.delivery.arrived_at):
        metrics.itl_s.observe(after - before)
