"""The public gRPC face: a driver between calls and request lives. Prompts come as raw bytes, bounded before parsing."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from isthmus.clock import LoopClock
from isthmus.config import RouterConfig
from isthmus.errors import DeadlinePassed, Draining, InvalidRequest, IsthmusError, WorkersUnavailable
from isthmus.process.serving import until_none_left
from isthmus.text.text_threads import TextThreads
from isthmus.v1 import inference_pb2, inference_pb2_grpc
from router.client.caller import ClientGone, ResumeWish
from router.client.validate import (
    ModelFacts,
    check_chat,
    check_model,
    check_request,
    check_resume,
    check_token_ids,
    parse_request,
)
from router.life.request_life import Lives, RequestLife

SERVICE = "isthmus.v1.InferenceService"
_SLACK_BYTES = 4096  # a message around a prompt of the allowed size
MessageT = TypeVar("MessageT", bound=Message)
Context = grpc.aio.ServicerContext[Any, Any]
Wrap = Callable[[inference_pb2.GenerateResponse], Message]


@dataclass(frozen=True, slots=True)
class Backend:
    """What the server hands requests to."""

    lives: Lives
    model: ModelFacts
    text: TextThreads
    clock: LoopClock


class GrpcCaller:
    """One call's end at its client. Written by its life (`tell`, `end`) and its handler, both in the event loop."""

    def __init__(self, context: Context, wrap: Wrap):
        self._context = context
        self._wrap = wrap
        self._message: inference_pb2.GenerateResponse | None = None
        self._error: BaseException | None = None
        self._is_over = False
        self._changed = asyncio.Event()

    def tell(self, message: inference_pb2.GenerateResponse) -> None:
        self._message = message
        self._changed.set()

    def end(self, error: BaseException | None) -> None:
        self._error = error
        self._is_over = True
        self._changed.set()

    async def pass_on(self, life: RequestLife, clock: LoopClock) -> None:
        """Writes what the life tells, until it ends. Raises what it ended with; CancelledError: the client is gone."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                if self._message is not None:
                    await self._context.write(self._wrap(self._message))
                    self._message = None
                    life.told()
                elif self._is_over:
                    break
        except (asyncio.CancelledError, grpc.aio.InternalError) as error:
            life.left(clock.now())  # gRPC says so when the client is gone, to whoever writes
            raise asyncio.CancelledError from error
        if isinstance(self._error, ClientGone):
            raise asyncio.CancelledError
        if self._error is not None:
            raise self._error


class InferenceServer(inference_pb2_grpc.InferenceServiceServicer):
    """Event loop only. `backend` is None until the router has opened everything."""

    def __init__(self, config: RouterConfig):
        self._config = config
        self._is_draining = False
        self.backend: Backend | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Every method in one table, added once: which of two handlers of one method wins differs between grpcio's
        releases. Methods that may carry a prompt take raw bytes."""
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
        return len(self.backend.lives) if self.backend is not None else 0

    async def drain(self, timeout_s: float) -> int:
        """Refuses new requests at once, hands kept streams on, waits for the others; what is left at the end."""
        self._is_draining = True
        if self.backend is None:
            return 0
        return await until_none_left(self.backend.lives.hand_on, timeout_s)

    async def Generate(self, request: bytes, context: Context) -> None:  # noqa: N802 - named by the protocol
        """Writes to the context itself, so that cancelling the call cancels whatever the request waits for."""
        backend = self._backend_for_work()
        received_at = backend.clock.now()
        timeout_s = self._timeout_s(context)
        try:
            async with backend.clock.timeout(timeout_s):
                message = parse_request(request, self._config.max_prompt_bytes)
                check_request(message, backend.model)
                token_ids = await _encode(backend.text, message)
            opened = backend.lives.opener.open(message, token_ids, received_at, timeout_s)
        except TimeoutError as passed:
            backend.lives.on_end(None, late := DeadlinePassed("the request's deadline has passed"))
            raise late from passed
        except IsthmusError as refusal:
            backend.lives.on_end(None, refusal)
            raise
        except asyncio.CancelledError:
            backend.lives.on_end(None, ClientGone())
            raise
        caller = GrpcCaller(context, lambda response: response)
        await caller.pass_on(backend.lives.begin(opened, caller), backend.clock)

    async def Resume(self, request: inference_pb2.ResumeRequest, context: Context) -> None:  # noqa: N802
        backend = self._backend_for_work()
        check_resume(request)
        caller = GrpcCaller(context, _as_resume)
        wish = ResumeWish(request.request_id, request.next_index, self._timeout_s(context))
        await caller.pass_on(backend.lives.resume(wish, caller), backend.clock)

    async def Cancel(  # noqa: N802
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """The cancelled call ends with `finished`, reason CANCELLED, and what it had so far."""
        backend = self._started()
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        backend.lives.cancel(request.request_id, answered.set_result)
        return inference_pb2.CancelResponse(found=await answered)

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
        async with self._within(context):
            token_ids = await _encode(backend.text, message)
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(self, request: bytes, context: Context) -> inference_pb2.DetokenizeResponse:  # noqa: N802
        backend = self._started()
        message = self._parse(request, inference_pb2.DetokenizeRequest, "token_ids")
        check_model(message.model, backend.model)
        check_token_ids("token_ids", message.token_ids, backend.model.vocab_size, may_be_empty=True)
        async with self._within(context):
            return inference_pb2.DetokenizeResponse(text=await backend.text.decode(message.token_ids))

    @contextlib.asynccontextmanager
    async def _within(self, context: Context) -> AsyncIterator[None]:
        """The client's time, within the server's bounds. Raises DeadlinePassed."""
        try:
            async with self._started().clock.timeout(self._timeout_s(context)):
                yield
        except TimeoutError as passed:
            raise DeadlinePassed("the request's deadline has passed") from passed

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
        return max(0.0, min(remaining_s, self._config.max_timeout_s))

    def _parse(self, raw: bytes, message_class: type[MessageT], field: str) -> MessageT:
        """For the small calls: bounded by the bytes a prompt may have."""
        if len(raw) > self._config.max_prompt_bytes + _SLACK_BYTES:
            raise InvalidRequest.of(field, f"{len(raw)} bytes", f"at most {self._config.max_prompt_bytes} bytes")
        try:
            return message_class.FromString(raw)
        except DecodeError as error:
            raise InvalidRequest.of("request", "bytes that cannot be read", "a serialised request") from error


async def _encode(
    text: TextThreads, message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest
) -> Sequence[int]:
    if isinstance(message, inference_pb2.GenerateRequest) and message.HasField("token_ids"):
        return message.token_ids.ids
    if message.HasField("prompt"):
        return await text.encode(message.prompt)
    if message.HasField("chat"):
        check_chat(message.chat)
        return await text.encode_chat(message.chat)
    raise InvalidRequest.of("input", None, "one of prompt, chat")


def _serialise(message: Message) -> bytes:
    return message.SerializeToString()


def _as_resume(response: inference_pb2.GenerateResponse) -> inference_pb2.ResumeResponse:
    kind = response.WhichOneof("event")
    assert kind is not None, "every message says something"
    return inference_pb2.ResumeResponse(**{kind: getattr(response, kind)})
