"""Errors across gRPC, both ways: IsthmusError to a status with google.rpc details, and back at the client."""

import contextlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
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
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        wrap = _mapped_stream if handler.response_streaming else _mapped_unary
        make: Any = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind), method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def status_of(error: IsthmusError) -> status_pb2.Status:
    """ErrorInfo always, BadRequest and RetryInfo where they apply; texts are cut to a bound."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(
                field=_cut(violation.field), description=_cut(violation.description)
            )
            for violation in error.violations[:_MAX_VIOLATIONS]
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(max(0, round(error.retry_after_s * 1000)))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code = grpc.StatusCode[error.grpc_status].value[0]
    return status_pb2.Status(code=code, message=_cut(error.detail), details=[_packed(detail) for detail in details])


def error_from_rpc(error: grpc.aio.AioRpcError) -> IsthmusError:
    """The typed error a peer raised. Without details (the C core's own failures) only the code decides."""
    metadata = error.trailing_metadata() or ()
    raw = next((value for key, value in metadata if key == _DETAILS_KEY), None)
    status = _parse_status(raw) if isinstance(raw, bytes) else None
    return _from_code(error.code()) if status is None else error_from_status(status)


def error_from_status(status: status_pb2.Status) -> IsthmusError:
    """As `error_from_rpc`, from the status itself. A reason this version does not know becomes a plain IsthmusError."""
    reason, retry_after_s, violations = "", None, ()
    for packed in status.details:
        if packed.TypeName() == "google.rpc.ErrorInfo":
            info = error_details_pb2.ErrorInfo()
            reason = info.reason if packed.Unpack(info) and info.domain == DOMAIN else ""
        elif packed.TypeName() == "google.rpc.RetryInfo":
            retry = error_details_pb2.RetryInfo()
            packed.Unpack(retry)
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        elif packed.TypeName() == "google.rpc.BadRequest":
            bad = error_details_pb2.BadRequest()
            packed.Unpack(bad)
            violations = tuple(FieldViolation(item.field, item.description) for item in bad.field_violations)
    return typed_error(reason, status.message, retry_after_s=retry_after_s, violations=violations)


def typed_error(
    reason: str, detail: str, *, retry_after_s: float | None = None, violations: tuple[FieldViolation, ...] = ()
) -> IsthmusError:
    """The error class of an ErrorInfo reason, also for the reasons carried inside session messages."""
    error_class = _classes_by_reason().get(reason, IsthmusError)
    error = error_class.__new__(error_class)
    IsthmusError.__init__(error, detail, retry_after_s=retry_after_s, violations=violations)
    return error


@contextlib.contextmanager
def typed_errors() -> Generator[None]:
    """Calls made inside raise IsthmusError instead of AioRpcError."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


def _mapped_unary(handler: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await handler(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the call's root
            await _end(context, error, method)

    return call


def _mapped_stream(handler: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            responses = handler(request, context)
            if not hasattr(responses, "__aiter__"):  # a coroutine that writes to the context itself
                await responses
                return
            async with contextlib.aclosing(responses):
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the call's root
            await _end(context, error, method)

    return call


async def _end(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> NoReturn:
    if not isinstance(error, IsthmusError):
        error_id = secrets.token_hex(8)
        _log.exception("rpc.failed", error, method=method, error_id=error_id)
        error = IsthmusError(f"internal error {error_id}")
    status = status_of(error)
    code = grpc.StatusCode[error.grpc_status]
    await context.abort(code, status.message, ((_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort raises")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _parse_status(raw: bytes) -> status_pb2.Status | None:
    status = status_pb2.Status()
    try:
        status.ParseFromString(raw)
    except ValueError:
        return None
    return status


def _from_code(code: grpc.StatusCode) -> IsthmusError:
    error_class, detail = _BY_STATUS.get(code, (IsthmusError, f"the peer failed with {code.name}"))
    return error_class(detail)


def _classes_by_reason() -> dict[str, type[IsthmusError]]:
    found: dict[str, type[IsthmusError]] = {}
    pending: list[type[IsthmusError]] = [IsthmusError]
    while pending:
        error_class = pending.pop()
        found.setdefault(error_class.reason, error_class)
        pending.extend(error_class.__subclasses__())
    return found
