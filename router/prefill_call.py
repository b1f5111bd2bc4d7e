"""The Prefill call of one attempt: messages become events; leaving the block drops the call, which cancels the work."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from isthmus.errors import IsthmusError, RequestCancelled, WorkerLost
from isthmus.log import get_logger
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.v1 import prefill_pb2
from router.inbox import Failed, Source
from router.placement import PrefillPlace

CANCEL_WAIT_S = 1.0
_log = get_logger("router.prefill")


@asynccontextmanager
async def prefilling(
    place: PrefillPlace, request: prefill_pb2.PrefillRequest, source: Source, *, timeout_s: float
) -> AsyncIterator[None]:
    """Events reach `source` while the block runs: Progress, one FirstToken, then Done; or Failed."""
    worker = place.worker
    worker.calls.add(source)  # so that a hung worker's requests are told
    task = asyncio.create_task(_read(place, request, source, timeout_s), name="prefill-call")
    try:
        yield
    finally:
        worker.calls.discard(source)
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_WAIT_S)


async def _read(place: PrefillPlace, request: prefill_pb2.PrefillRequest, source: Source, timeout_s: float) -> None:
    """Never raises but by cancellation: the request's task learns everything from its source."""
    error: IsthmusError = WorkerLost("the prefill worker ended the call early")
    try:
        async for response in place.worker.stub.Prefill(request, timeout=timeout_s):
            _pass_on(response, place, source)
            if response.HasField("done"):
                return
    except asyncio.CancelledError:
        source.put(Failed(WorkerLost("the prefill call was dropped")))  # heard only if its channel was closed
        raise
    except grpc.aio.AioRpcError as rpc_error:
        said = error_from_rpc(rpc_error)
        # Cancelled by the worker's side, not by the client.
        error = WorkerLost("the prefill worker dropped the call") if isinstance(said, RequestCancelled) else said
    except grpc.aio.UsageError:  # the pool has closed the channel of a worker that left
        error = WorkerLost("the prefill worker has left")
    except Exception as unexpected:  # noqa: BLE001 - the task's root
        _log.exception("prefill.failed", unexpected, request_id=request.request.request_id)
        error = WorkerLost("the prefill worker's answer could not be read")
    source.put(Failed(error, in_company=len(place.worker.calls) > 1))


def _pass_on(response: prefill_pb2.PrefillResponse, place: PrefillPlace, source: Source) -> None:
    """What a request wants to hear; not news of a later version."""
    match response.WhichOneof("event"):
        case "queued":
            source.put(response.queued)
        case "progress":
            place.computed_up_to(response.progress.num_computed_tokens)
            source.put(response.progress)
        case "first_token":
            place.give_back()
            source.put(response.first_token)
        case "done":
            source.put(response.done)
        case _:
            pass
