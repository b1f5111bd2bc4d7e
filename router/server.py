"""The public gRPC face. Large requests arrive as raw bytes, so that their bounds are checked before they are parsed."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from isthmus.clock import Clock
from isthmus.config import RouterConfig
from isthmus.errors import Draining, InvalidRequest, IsthmusError, NotYet, RequestCancelled, WorkersUnavailable
from isthmus.ids import new_request_id, new_seed
from isthmus.metrics import Metrics
from isthmus.serving import until_none_left
from isthmus.types import Request
from isthmus.v1 import inference_pb2, inference_pb2_grpc
from router.delivery import Delivery, Timeline
from router.dispatch import Call, Dispatch
from router.interrupt import Interruptible
from router.text import TextWorkers
from router.validate import (
    ModelFacts,
    check_chat,
    check_model,
    check_request,
    check_token_ids,
    complete_sampling,
    parse_request,
)

SERVICE = "isthmus.v1.InferenceService"
_SLACK_BYTES = 4096  # a message around a prompt of the allowed size
Context = grpc.aio.ServicerContext[Any, Any]
MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class Backend:
    """What the server hands requests to."""

    dispatch: Dispatch
    model: ModelFacts
    text: TextWorkers
    metrics: Metrics
    clock: Clock


class InferenceServer(inference_pb2_grpc.InferenceServiceServicer):
    """Event loop only. Owns the lives of running calls, for Cancel and drain. `backend` is None at first."""

    def __init__(self, config: RouterConfig):
        self._config = config
        self._lives: dict[str, Interruptible] = {}
        self._is_draining = False
        self.backend: Backend | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """The first handler found wins: those that take raw bytes stand before the generated ones."""
        raw = {
            "Generate": grpc.unary_stream_rpc_method_handler(self.Generate, response_serializer=_serialise),
            "Tokenize": grpc.unary_unary_rpc_method_handler(self.Tokenize, response_serializer=_serialise),
            "Detokenize": grpc.unary_unary_rpc_method_handler(self.Detokenize, response_serializer=_serialise),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, raw),))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)

    @property
    def num_streams(self) -> int:
        return len(self._lives)

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests at once, waits for the running ones; what is left at the end."""
        self._is_draining = True
        return await until_none_left(lambda: self.num_streams, timeout_s)

    async def Generate(self, request: bytes, context: Context) -> None:  # noqa: N802 - named by the protocol
        """Writes to the context itself, so that cancelling the call cancels whatever the request waits for."""
        backend = self._backend_for_work()
        client = _Client(context, backend.clock.now(), self._timeout_s(context))
        call: Call | None = None
        outcome = "internal"
        try:
            async with Interruptible(client.timeout_s) as life:
                call = await self._open_call(backend, request, client, life)
                self._lives[call.request.request_id] = life
                await backend.dispatch.serve(call)
            outcome = "finished"
        except IsthmusError as error:
            outcome = error.reason.lower()
            if not isinstance(error, RequestCancelled) or call is None or client.is_writing:
                raise
            await client.write(backend.dispatch.finished(call))
        except asyncio.CancelledError:
            outcome = "client_gone"
            raise
        finally:
            if call is not None:
                self._lives.pop(call.request.request_id, None)
            _count(backend.metrics, call, outcome)

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Context) -> None:  # noqa: N802
        raise NotYet("Resume is not served yet; continue with a new request")

    async def Cancel(  # noqa: N802
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """The cancelled call ends with `finished`, reason CANCELLED, and what it had so far."""
        life = self._lives.get(request.request_id)
        if life is not None:
            life.interrupt(RequestCancelled("cancelled by a Cancel call"))
        return inference_pb2.CancelResponse(found=life is not None)

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
            token_ids = await _encode(backend.text, message)
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: bytes, context: Context) -> inference_pb2.DetokenizeResponse:  # noqa: N802
        backend = self._started()
        message = self._parse(request, inference_pb2.DetokenizeRequest, "token_ids")
        check_model(message.model, backend.model)
        check_token_ids("token_ids", message.token_ids, backend.model.vocab_size, may_be_empty=True)
        async with Interruptible(self._timeout_s(context)):
            return inference_pb2.DetokenizeResponse(text=await backend.text.decode(message.token_ids))

    async def _open_call(self, backend: Backend, raw: bytes, client: "_Client", life: Interruptible) -> Call:
        """Parses, validates and tokenises. Raises InvalidRequest and its kin before anything is held."""
        message = parse_request(raw, self._config.max_prompt_bytes)
        check_request(message, backend.model)
        token_ids = await _encode(backend.text, message)
        field = message.WhichOneof("input") or "prompt"
        sampling = complete_sampling(message.sampling, len(token_ids), backend.model, prompt_field=field)
        request = Request(
            request_id=new_request_id(),
            seed=message.sampling.seed if message.sampling.HasField("seed") else new_seed(),
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
            eos_token_ids=backend.model.eos_token_ids,
            tenant=message.tenant,
            priority=message.priority,
        )
        detokenizer = backend.text.tokenizer.detokenizer(sampling.stop, include_stop=sampling.include_stop)
        return Call(
            request=request,
            client_request_id=message.client_request_id,
            delivery=Delivery(request, backend.model.context_length, detokenizer),
            timeline=Timeline(client.received_at),
            life=life,
            deadline=client.received_at + client.timeout_s,
            write=client.write,
        )

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


class _Client:
    """Remembers whether a message was still on its way when the call was interrupted: then no other may follow."""

    def __init__(self, context: Context, received_at: float, timeout_s: float):
        self._context = context
        self.received_at = received_at
        self.timeout_s = timeout_s
        self.is_writing = False

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        self.is_writing = True
        await self._context.write(response)
        self.is_writing = False


async def _encode(
    text: TextWorkers, message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest
) -> Sequence[int]:
    if isinstance(message, inference_pb2.GenerateRequest) and message.HasField("token_ids"):
        return message.token_ids.ids
    if message.HasField("prompt"):
        return await text.encode(message.prompt)
    if message.HasField("chat"):
        check_chat(message.chat)
        return await text.encode_chat(message.chat)
    raise InvalidRequest.of("input", None, "one of prompt, chat")


def _count(metrics: Metrics, call: Call | None, outcome: str) -> None:
    """Once a call; labels come from fixed sets."""
    reason = call.delivery.finish_reason if call else None
    metrics.requests.labels(reason.value if outcome == "finished" and reason else outcome).inc()
    if call is None:
        return
    metrics.tokens.labels("prompt").inc(len(call.request.prompt_token_ids))
    metrics.tokens.labels("cached").inc(call.num_cached_tokens)
    metrics.tokens.labels("generated").inc(call.delivery.num_tokens)
    if (first_sent_at := call.timeline.first_sent_at) is not None:
        metrics.ttft_s.observe(first_sent_at - call.timeline.received_at)
    for before, after in itertools.pairwise(call.delivery.arrived_at):
        metrics.itl_s.observe(after - before)
