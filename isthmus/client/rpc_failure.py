"""What gRPC reports about a failed call, as a CallFailure. For the two drivers of the client."""

from typing import Any

import grpc

from isthmus.client.failure import CallFailure, FailureKind
from isthmus.process.rpc_errors import error_from_rpc

_DETAILS_KEY = "grpc-status-details-bin"
# What gRPC's C core reports when a connection, not a router, ended the call.
_CONNECTION_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,
}


def failure_of(error: Any) -> CallFailure:
    """The failure behind a grpc.RpcError, of grpc or of grpc.aio.

    A status with details was written by a router; one without was made up by the C core, or by a server that is no
    router: then only the status code decides.
    """
    typed_error = error_from_rpc(error)
    has_details = any(key == _DETAILS_KEY for key, _ in error.trailing_metadata() or ())
    if has_details:
        return CallFailure.told(typed_error)
    if error.code() in _CONNECTION_CODES:
        return CallFailure.of_connection(typed_error)
    return CallFailure(typed_error, FailureKind.FINAL)
