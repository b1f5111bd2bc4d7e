"""Errors across gRPC, both ways: IsthmusError to a status with google.rpc details, and back at the client."""

import contextlib
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf import any as any_message
from google.protobuf import duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from isthmus.errors import (
    DeadlinePassed,
    FieldViolation,
    InvalidRequest,
    IsthmusError,
    NotYet,
    Overloaded,
    RequestCancelled,
    WorkerLost,
)
from isthmus.log import get_logger

DOMAIN = "isthmus"
_DETAILS_KEY = "grpc-status-details-bin"
_MAX_VIOLATIONS = 8  # details travel as metadata, which the peer bounds
_MAX_TEXT = 512
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # generic in its stubs only
DetailT = TypeVar("DetailT", bound=Message)
_log = get_logger("rpc")

# For peers that send no details: the C core itself, or a program of others.
_BY_STATUS: dict[grpc.StatusCode, tuple[type[IsthmusError], str]] = {
    grpc.StatusCode.UNAVAILABLE: (WorkerLost, "the connection failed"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (DeadlinePassed, "the deadline passed"),
    grpc.StatusCode.CANCELLED: (RequestCancelled, "the call was cancelled"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (Overloaded, "a bound of the peer was reached"),
    grpc.StatusCode.INVALID_ARGUMENT: (InvalidRequest, "the peer refused the request"),
    grpc.StatusCode.UNIMPLEMENTED: (NotYet, "the peer does not serve this call"),
}


class ErrorMapper(grpc.aio.ServerInterceptor):
    """Ends a call whose handler raised: IsthmusError with its status, all else as INTERNAL with an id from the log."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = str(handler_call_details.method)
        streams = (handler.request_streaming, handler.response_streaming)
        kind = "_".join("stream" if many else "unary" for many in streams)
        wrap = _mapped_stream if handler.response_streaming else _mapped_unary
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind), method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def status_of(error: IsthmusError) -> status_pb2.Status:
    """ErrorInfo always, BadRequest and RetryInfo where they apply; texts are cut to a bound."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for violation in error.violations[:_MAX_VIOLATIONS]:
            bad.field_violations.add(field=_cut(violation.field), description=_cut(violation.description))
        details.append(bad)
    if error.retry_after_s is not None:
        delay = duration.from_milliseconds(max(0, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code = grpc.StatusCode[error.grpc_status].value[0]
    return status_pb2.Status(code=code, message=_cut(error.detail), details=map(any_message.pack, details))


def error_from_rpc(error: grpc.aio.AioRpcError) -> IsthmusError:
    """The typed error a peer raised. Without details (the C core's own failures) only the code decides."""
    metadata: dict[str, Any] = dict(tuple(error.trailing_metadata() or ()))
    try:
        status = status_pb2.Status.FromString(metadata[_DETAILS_KEY])
    except (KeyError, DecodeError):
        error_class, detail = _BY_STATUS.get(error.code(), (IsthmusError, f"the peer failed with {error.code().name}"))
        return error_class(detail)
    return error_from_status(status)


def error_from_status(status: status_pb2.Status) -> IsthmusError:
    """As `error_from_rpc`, from the status itself. A reason this version does not know becomes a plain IsthmusError."""
    info = _detail(status, error_details_pb2.ErrorInfo)
    retry = _detail(status, error_details_pb2.RetryInfo)
    bad = _detail(status, error_details_pb2.BadRequest)
    return typed_error(
        info.reason if info.domain == DOMAIN else "",
        status.message,
        retry_after_s=retry.retry_delay.ToMilliseconds() / 1000 if retry.HasField("retry_delay") else None,
        violations=tuple(FieldViolation(item.field, item.description) for item in bad.field_violations),
    )


def typed_error(
    reason: str, detail: str, *, retry_after_s: float | None = None, violations: tuple[FieldViolation, ...] = ()
) -> IsthmusError:
    """The error class of an ErrorInfo reason, also for the reasons carried inside session messages."""
    error_class = next((known for known in _classes(IsthmusError) if known.reason == reason), IsthmusError)
    error = error_class.__new__(error_class)
    IsthmusError.__init__(error, detail, retry_after_s=retry_after_s, violations=violations)
    return error


def _mapped_unary(handler: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        async with _mapped(context, method):
            return await handler(request, context)

    return call


def _mapped_stream(handler: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        async with _mapped(context, method):
            responses = handler(request, context)
            if not hasattr(responses, "__aiter__"):  # a coroutine that writes to the context itself
                await responses
                return
            async with contextlib.aclosing(responses):
                async for response in responses:
                    yield response

    return call


@contextlib.asynccontextmanager
async def _mapped(context: grpc.aio.ServicerContext[Any, Any], method: str) -> AsyncGenerator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:  # noqa: BLE001 - the call's root
        if isinstance(error, IsthmusError):
            shown = error
        else:
            error_id = secrets.token_hex(8)
            _log.exception("rpc.failed", error, method=method, error_id=error_id)
            shown = IsthmusError(f"internal error {error_id}")
        status = status_of(shown)
        code = grpc.StatusCode[shown.grpc_status]
        await context.abort(code, status.message, ((_DETAILS_KEY, status.SerializeToString()),))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def _detail(status: status_pb2.Status, kind: type[DetailT]) -> DetailT:
    """The status's detail of this kind, an empty one where it has none."""
    detail = kind()
    any(packed.Unpack(detail) for packed in status.details)
    return detail


def _classes(root: type[IsthmusError]) -> Iterator[type[IsthmusError]]:
    """The tree below and with `root`, parents first."""
    yield root
    for error_class in root.__subclasses__():
        yield from _classes(error_class)
