"""A peer that falls silent without closing its connection is lost within keepalive interval and timeout."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from isthmus.errors import WorkerLost
from isthmus.process.rpc import bind_grpc, channel, create_server
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.testing.relay import Relay, relayed_port
from isthmus.v1 import inference_pb2, inference_pb2_grpc

LOST_WITHIN_S = 4.0


class Ticking(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, interval_s: float):
        self.interval_s = interval_s
        self.left = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:  # noqa: N802
        try:
            while True:
                yield inference_pb2.GenerateResponse()
                await asyncio.sleep(self.interval_s)
        finally:
            self.left.set()


@contextlib.asynccontextmanager
async def relayed(servicer: Ticking) -> AsyncGenerator[tuple[Relay, grpc.aio.Channel]]:
    server = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = bind_grpc(server, "127.0.0.1", 0)
    await server.start()
    try:
        async with relayed_port(port) as (relay, address), channel(address) as opened:
            yield relay, opened
    finally:
        await server.stop(0)


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("interval_s", [0.02, 60.0], ids=["streaming", "waiting"])
async def test_both_sides_lose_a_silent_peer(interval_s: float) -> None:
    servicer = Ticking(interval_s)
    async with relayed(servicer) as (relay, opened):
        call = inference_pb2_grpc.InferenceServiceStub(opened).Generate(inference_pb2.GenerateRequest())
        await call.read()
        relay.freeze()
        frozen_at = time.monotonic()

        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await read_to_the_end(call)
        assert isinstance(error_from_rpc(lost.value), WorkerLost)
        await asyncio.wait_for(servicer.left.wait(), LOST_WITHIN_S)
        assert time.monotonic() - frozen_at < LOST_WITHIN_S
