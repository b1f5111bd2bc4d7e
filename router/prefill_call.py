"""The Prefill call of one attempt: messages become events; leaving the block drops the call, which cancels the work."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from isthmus.errors import RequestCancelled, WorkerLost
from isthmus.log import get_logger
from isthmus.rpc_errors import error_from_rpc
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
    try:
        call = place.worker.stub.Prefill(request, timeout=timeout_s)
        num_computed, is_done = 0, False
        async for response in call:
            match response.WhichOneof("event"):
                case "progress":
                    place.computed(response.progress.num_computed_tokens - num_computed)
                    num_computed = response.progress.num_computed_tokens
                    source.put(response.progress)
                case "first_token":
                    place.computed(place.num_tokens_ahead)
                    source.put(response.first_token)
                case "done":
                    is_done = True
                    source.put(response.done)
                case _:
                    pass  # queued, or news of a later version
        error = None if is_done else WorkerLost("the prefill worker ended the call early")
    except asyncio.CancelledError:
        source.put(Failed(WorkerLost("the prefill call was dropped")))  # heard only if its channel was closed
        raise
    except grpc.aio.AioRpcError as rpc_error:
        error = error_from_rpc(rpc_error)
        if isinstance(error, RequestCancelled):  # by the worker's side, not by the client
            error = WorkerLost("the prefill worker dropped the call")
    except Exception as unexpected:  # noqa: BLE001 - the task's root
        _log.exception("prefill.failed", unexpected, request_id=request.request.request_id)
        error = WorkerLost("the prefill worker's answer could not be read")
    if error is not None:
        source.put(Failed(error))
