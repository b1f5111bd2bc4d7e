"""The gRPC face over a real loop: what it takes, and a drain that waits for the last block."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import pytest

from isthmus.clock import SystemClock
from isthmus.convert import extent_to_proto, request_to_proto
from isthmus.failpoints import Failpoints
from isthmus.process.rpc import bind_grpc, channel, create_server
from isthmus.types import Request, SamplingParams, TransferTarget
from isthmus.v1 import prefill_pb2, prefill_pb2_grpc
from prefill_service.server import PrefillServer
from tests.engine.engines import bundled_engine
from tests.kv_transfer.world import DecodeSide
from tests.prefill.conftest import Prefill, prefilling, prompt, reserve

ACK_TIMEOUT_S = 1.0


@asynccontextmanager
async def serving(prefill: Prefill) -> AsyncIterator[tuple[PrefillServer, Any]]:
    servicer, server = PrefillServer(SystemClock()), create_server()
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)
    port = bind_grpc(server, "127.0.0.1", 0)
    servicer.open(prefill.submissions)
    await server.start()
    async with channel(f"127.0.0.1:{port}") as connection:
        yield servicer, prefill_pb2_grpc.PrefillServiceStub(connection)
    await server.stop(0)


def message(target: TransferTarget | None, emitted: tuple[int, ...] = ()) -> prefill_pb2.PrefillRequest:
    sampling = SamplingParams(max_tokens=1 if target is None else 8, ignore_eos=True)
    request = Request("request", 1, tuple(prompt(100)), sampling, emitted_token_ids=emitted)
    wire = None
    if target is not None:
        missing = [extent_to_proto(extent, bundled_engine().layout) for extent in target.missing]
        wire = prefill_pb2.TransferTarget(**{**asdict(target), "missing": missing})
    return prefill_pb2.PrefillRequest(request=request_to_proto(request), target=wire)


async def test_a_request_that_goes_on_elsewhere_is_prefilled_like_any_other() -> None:
    with prefilling() as prefill:
        async with serving(prefill) as (_, stub):
            said = [
                [event async for event in stub.Prefill(message(None, emitted), timeout=30)] for emitted in ((), (5, 6))
            ]
    tokens = [event.first_token.token for events in said for event in events if event.HasField("first_token")]
    assert tokens[0] == tokens[1]
    assert [event.WhichOneof("event") for event in said[0]] == ["queued", "progress", "first_token", "done"]


async def test_a_drain_waits_for_blocks_that_are_not_acknowledged_though_their_caller_has_gone(
    decode: DecodeSide,
) -> None:
    with prefilling(Failpoints.parse("transfer.ack=drop"), ack_timeout_s=ACK_TIMEOUT_S) as prefill:
        async with serving(prefill) as (servicer, stub):
            call = stub.Prefill(message(reserve(decode, 0, 100)), timeout=30)
            async for event in call:
                if event.HasField("first_token"):
                    break
            call.cancel()
            async with asyncio.timeout(5):
                while servicer.num_calls:  # noqa: ASYNC110 - the handler ends in a task of gRPC's
                    await asyncio.sleep(0.01)
            assert await servicer.drain(0.05) == prefill.engine.pool.counts().draining == 7
            assert await servicer.drain(2 * ACK_TIMEOUT_S) == 0
            with pytest.raises(Exception, match="draining"):
                await anext(aiter(stub.Prefill(message(None), timeout=30)))
