"""What a status of gRPC lets the client do."""

import grpc
import pytest

from isthmus.client.failure import FailureKind
from isthmus.client.rpc_failure import failure_of
from isthmus.errors import (
    DeadlinePassed,
    Draining,
    IndexOutOfRange,
    InvalidRequest,
    IsthmusError,
    NoFreeBlocks,
    Overloaded,
    SlowClient,
    StaleOwner,
    StreamGone,
    TransferIncomplete,
    WorkerLost,
    WorkersUnavailable,
)
from tests.client.virtual_routers import rpc_error, told

CODE = grpc.StatusCode


@pytest.mark.parametrize("code", [CODE.UNAVAILABLE, CODE.INTERNAL, CODE.UNKNOWN, CODE.CANCELLED], ids=lambda c: c.name)
def test_a_status_made_up_for_a_lost_connection_is_free_to_go_on(code: grpc.StatusCode) -> None:
    failure = failure_of(rpc_error(code))
    assert (failure.kind, failure.is_connection_lost) == (FailureKind.BROKEN, True)


@pytest.mark.parametrize("code", [CODE.DEADLINE_EXCEEDED, CODE.UNIMPLEMENTED, CODE.RESOURCE_EXHAUSTED])
def test_another_status_without_details_is_final(code: grpc.StatusCode) -> None:
    failure = failure_of(rpc_error(code))
    assert (failure.kind, failure.is_connection_lost) == (FailureKind.FINAL, False)


@pytest.mark.parametrize(
    ("kind", "errors"),
    [
        (FailureKind.GONE, [StreamGone("s"), IndexOutOfRange("i")]),
        (FailureKind.BROKEN, [WorkerLost("w"), Draining("d"), TransferIncomplete("t"), StaleOwner("o")]),
        (FailureKind.REFUSED, [Overloaded("o"), NoFreeBlocks("b"), WorkersUnavailable("u")]),
        (FailureKind.FINAL, [InvalidRequest("i"), DeadlinePassed("d"), SlowClient("s"), IsthmusError("e")]),
    ],
    ids=lambda value: value.name if isinstance(value, FailureKind) else "",
)
def test_an_error_that_a_router_told_decides_by_its_type(kind: FailureKind, errors: list[IsthmusError]) -> None:
    for error in errors:
        failure = told(error)
        assert (type(failure.error), failure.kind, failure.is_connection_lost) == (type(error), kind, False)
