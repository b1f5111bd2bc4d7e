"""The router's cores behind its real gRPC port; scripted workers behind theirs where the router's links are tested."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from isthmus.clock import SystemClock
from isthmus.ids import SystemIds
from isthmus.process.loop_driver import LoopDriver, Turn
from isthmus.process.rpc import PUBLIC_RECEIVE_BYTES, channel, create_server
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.text.text_threads import TextThreads
from isthmus.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from router.client.grpc_caller import Backend, InferenceServer
from router.pool.decode_stream import Failed
from router.pool.drivers import GrpcWorkerLinks
from tests.router.fakes import MODEL, ByteTokenizer, Cluster, Result, RouterUnderTest
from tests.router.scripted_decode import ScriptedDecode
from tests.router.scripted_prefill import ScriptedPrefill


class LoopTime:
    """The event loop's time, for cores and scripted workers."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.failures: list[BaseException] = []  # of cores' turns

    def now(self) -> float:
        return self.clock.now()

    def now_ns(self) -> int:
        return self.clock.now_ns()

    def after(self, seconds: float, function: Callable[[], object]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, function)

    def drive(self, turn: Turn) -> LoopDriver:
        return LoopDriver(turn, self.clock, self.failures.append)


def real_time_cluster() -> Cluster:
    return Cluster(time=LoopTime(), ids=SystemIds())


@dataclass(eq=False)
class ServedRouter:
    cores: RouterUnderTest
    server: InferenceServer
    stub: Any
    address: str

    def call(self, message: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0) -> Any:
        return self.stub.Generate(message, timeout=timeout_s)

    async def generate(self, message: inference_pb2.GenerateRequest, timeout_s: float | None = 20.0) -> Result:
        """Raises the typed error the router answered with."""
        return await read(self.call(message, timeout_s))

    async def is_quiet(self) -> None:
        """Waits until nothing of any request is left: here, on the workers, and among the tasks."""

        def left() -> list[str]:
            tasks = [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "prefill-call"]
            return self.cores.left() + tasks

        await until(lambda: not left(), "nothing is left")


@contextlib.asynccontextmanager
async def served_router(cluster: Cluster, *, links: Any = None, **settings: Any) -> AsyncIterator[ServedRouter]:
    """Over the cluster's workers, scripted ones without links of its own."""
    cores = RouterUnderTest(cluster, links=links, **settings)
    server = InferenceServer(cores.config)
    tokenizer: Any = ByteTokenizer()
    limits = {"max_prompt_bytes": cores.config.max_prompt_bytes, "max_tokens": MODEL.context_length}
    with TextThreads(tokenizer, **limits) as text:
        server.backend = Backend(cores.lives, MODEL, text, SystemClock())
        async with listening(server.register) as address, channel(address) as client:
            stub = inference_pb2_grpc.InferenceServiceStub(client)
            now = cluster.time.now
            await until(lambda: len(cores.pool.usable_decode(now())) == len(cluster.decode), "sessions")
            yield ServedRouter(cores, server, stub, address)
            assert cluster.time.failures == []


@contextlib.asynccontextmanager
async def real_links() -> AsyncIterator[GrpcWorkerLinks]:
    links = GrpcWorkerLinks(channel, SystemClock())
    try:
        yield links
    finally:
        await links.close()


@contextlib.asynccontextmanager
async def listening(register: Callable[[grpc.aio.Server], None]) -> AsyncIterator[str]:
    """The address of a server with these services."""
    server = create_server(max_receive_bytes=PUBLIC_RECEIVE_BYTES)
    register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


class _GrpcConnection:
    """A session's connection, over gRPC."""

    def __init__(self) -> None:
        self.outgoing: asyncio.Queue[decode_pb2.SessionResponse | None] = asyncio.Queue()  # None: break off

    def say(self, **message: Any) -> None:
        self.outgoing.put_nowait(decode_pb2.SessionResponse(**message))

    def break_off(self) -> None:
        self.outgoing.put_nowait(None)


class DecodeServer(decode_pb2_grpc.DecodeServiceServicer):
    """A scripted decode worker behind a port."""

    def __init__(self) -> None:
        self.worker: ScriptedDecode | None = None

    def register(self, server: grpc.aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self, server)

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[decode_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[decode_pb2.SessionResponse]:
        assert self.worker is not None
        connection = _GrpcConnection()
        self.worker.greet(connection, (await anext(request_iterator)).hello)
        reader = asyncio.create_task(self._read(connection, request_iterator))
        try:
            while (message := await connection.outgoing.get()) is not None:
                yield message
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self.worker.lost(connection)

    async def Find(self, request: decode_pb2.FindRequest, context: Any) -> decode_pb2.FindResponse:  # noqa: N802
        assert self.worker is not None
        found = self.worker.find(request.request_id)
        return decode_pb2.FindResponse(found=found is not None, next_index=found or 0)

    async def _read(self, connection: _GrpcConnection, messages: AsyncIterator[decode_pb2.SessionRequest]) -> None:
        assert self.worker is not None
        async for message in messages:
            self.worker.hear(connection, message)


class _GrpcListener:
    """A Prefill call's listener, over gRPC."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[prefill_pb2.PrefillResponse | Failed] = asyncio.Queue()

    def take(self, response: prefill_pb2.PrefillResponse, at: float) -> None:
        self.said.put_nowait(response)

    def failed(self, failure: Failed, at: float) -> None:
        self.said.put_nowait(failure)


class PrefillServer(prefill_pb2_grpc.PrefillServiceServicer):
    """A scripted prefill worker behind a port."""

    def __init__(self) -> None:
        self.worker: ScriptedPrefill | None = None

    def register(self, server: grpc.aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(self, server)

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        assert self.worker is not None
        listener = _GrpcListener()
        run = self.worker.begin(request, listener)
        try:
            while True:
                said = await listener.said.get()
                if isinstance(said, Failed):
                    raise said.error
                yield said
                if said.HasField("done"):
                    return
        finally:
            self.worker.drop(run)


async def until(condition: Callable[[], object], what: str, timeout_s: float = 5.0) -> None:
    """Waits for something that sends no event."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError as late:
        raise AssertionError(f"not within {timeout_s} s: {what}") from late


async def read(call: Any, num_tokens: int | None = None, result: Result | None = None) -> Result:
    """What a call says, to its end or until it has said `num_tokens`. Raises the typed error it ends with."""
    result = result or Result()
    try:
        while num_tokens is None or result.accepted is None or len(result.token_ids) < num_tokens:
            response = await call.read()
            if response is grpc.aio.EOF:
                break
            result.take(response)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    if num_tokens is None and await call.code() is not grpc.StatusCode.OK:
        raise AssertionError(f"the call ended with {await call.code()}")
    return result
