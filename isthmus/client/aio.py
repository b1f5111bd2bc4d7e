"""The asyncio client."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from isthmus.client.attempts import (
    CANCEL_TIMEOUT_S,
    ID_TIMEOUT_S,
    ROUTER_TIMEOUT_S,
    UNARY_TIMEOUT_S,
    Attempts,
    Failure,
    Routers,
)
from isthmus.client.course import NO_END, Course, OutOfOrder
from isthmus.client.generation import Chunk, Generation
from isthmus.client.options import DEFAULT_TIMEOUT_S, GenerateOptions, Message, chat_of, request_of
from isthmus.clock import Clock, SystemClock
from isthmus.errors import WorkerLost, WorkersUnavailable
from isthmus.process.rpc import channel
from isthmus.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """An async context manager holding one connection to each router. For one event loop.

    `routers`: host:port addresses, a list or separated by commas. `router_timeout_s`: how long a request that no
    router has taken yet looks for one.
    """

    def __init__(
        self,
        routers: str | Sequence[str],
        *,
        router_timeout_s: float = ROUTER_TIMEOUT_S,
        clock: Clock = SystemClock(),
    ):
        self._routers = Routers(routers, clock)
        self._router_timeout_s = router_timeout_s
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._streams: weakref.WeakSet[AsyncStream] = weakref.WeakSet()
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what still runs."""
        await asyncio.gather(*(stream.aclose() for stream in list(self._streams)))
        await asyncio.gather(*self._background, return_exceptions=True)
        for opened in self._channels.values():
            await opened.close()

    async def connect(self, *, timeout_s: float = 3.0) -> None:
        """Not needed, but tells at once. Raises WorkersUnavailable when no router answers."""
        ready = [asyncio.create_task(self._channel(router.address).channel_ready()) for router in self._routers.all]
        done, waiting = await asyncio.wait(ready, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not done:
            raise WorkersUnavailable(f"no router answers at {self._routers.names}")

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> "AsyncStream":
        """Sent when the stream is first read. Raises InvalidRequest for what a request cannot hold."""
        attempts = self._attempts(options.get("timeout_s", DEFAULT_TIMEOUT_S))
        stream = AsyncStream(self, Course(request_of(prompt, options), attempts))
        self._streams.add(stream)
        return stream

    async def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Reads a stream to its end."""
        stream = self.generate(prompt, **options)
        async for _ in stream:
            pass
        return stream.result

    async def list_models(self) -> list[inference_pb2.Model]:
        return list((await self._ask("ListModels", inference_pb2.ListModelsRequest())).models)

    async def tokenize(self, prompt: str | None = None, *, chat: Sequence[Message] | None = None) -> list[int]:
        sources: dict[str, Any] = {"prompt": prompt} if chat is None else {"chat": chat_of(chat)}
        return list((await self._ask("Tokenize", inference_pb2.TokenizeRequest(**sources))).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return (await self._ask("Detokenize", inference_pb2.DetokenizeRequest(token_ids=token_ids))).text

    def open(self, course: Course) -> Any:
        """The call that is next. For AsyncStream."""
        message, attempts = course.next_message(), course.attempts
        stub = self._stub(attempts.router.address)
        method = stub.Resume if isinstance(message, inference_pb2.ResumeRequest) else stub.Generate
        return method(message, timeout=attempts.remaining_s())

    async def cancel(self, request_id: str, first: str) -> bool:
        """Asks `first`, then the other routers, to end a request, for at most a second; whether one knew it."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_TIMEOUT_S):
                for address in dict.fromkeys([first, *(router.address for router in self._routers.all)]):
                    with contextlib.suppress(grpc.RpcError):
                        if (await self._stub(address).Cancel(request, timeout=CANCEL_TIMEOUT_S)).found:
                            return True
        return False

    def in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Bounded work that its caller does not wait for; `close` does. For AsyncStream."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _ask(self, method: str, request: Any) -> Any:
        attempts = self._attempts(UNARY_TIMEOUT_S)
        while True:
            try:
                call = getattr(self._stub(attempts.router.address), method)
                return await call(request, timeout=attempts.remaining_s())
            except grpc.RpcError as error:
                delay_s = attempts.failed(Failure.of(error))
            await asyncio.sleep(delay_s)

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(self._routers, timeout_s=timeout_s, router_timeout_s=self._router_timeout_s)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:  # made here: a channel belongs to the loop that runs when it is made
            self._channels[address] = channel(address)
        return self._channels[address]

    def _stub(self, address: str) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self._channel(address))


class AsyncStream:
    """One generation. Iterating gives text, `chunks` gives tokens; leaving either before the end cancels the request.

    `result` fills while it is read. As an async context manager it is closed at the end of the block.
    """

    def __init__(self, client: AsyncClient, course: Course):
        self._client = client
        self._course = course
        self._call: Any = None
        self._responses: Any = None
        self._read: asyncio.Future[Any] | None = None  # the first
        self._telling: asyncio.Task[None] | None = None
        self._left = asyncio.Event()

    @property
    def result(self) -> Generation:
        return self._course.generation

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def __aiter__(self) -> AsyncGenerator[str]:
        async with contextlib.aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """Tokens with their logprobs, as they come. Raises IsthmusError."""
        course = self._course
        try:
            while not course.is_over:
                self._call = self._client.open(course)
                self._responses = aiter(self._call)
                failure = NO_END
                try:
                    while (response := await self._next()) is not None:
                        if (chunk := course.take(response)) is not None:
                            yield chunk
                except grpc.RpcError as error:
                    failure = Failure.of(error)
                except OutOfOrder as error:
                    failure = Failure(WorkerLost(str(error)))
                self._call.cancel()
                if not course.is_over:
                    await self._pause(course.failed(failure))
        finally:
            await self.aclose()

    async def cancel(self) -> None:
        """Ends the request wherever it runs. Who reads the stream gets what was made before, then its end."""
        course = self._course
        if not course.cancel():
            return
        self._left.set()
        if course.live_id or self._read is None:
            await self._tell(course.live_id)
        else:
            self._telling = self._client.in_background(self._tell_when_known(self._read))

    async def aclose(self) -> None:
        """Cancels it unless it has ended."""
        await self.cancel()
        if self._telling is None:
            self._drop()
        else:
            self._telling.add_done_callback(lambda _: self._drop())

    async def _tell(self, request_id: str) -> None:
        if not request_id or not await self._client.cancel(request_id, self._course.attempts.router.address):
            self._drop()

    async def _tell_when_known(self, read: asyncio.Future[Any]) -> None:
        """The id may be on its way, and without it nobody could end the request."""
        await asyncio.wait({read}, timeout=ID_TIMEOUT_S)
        is_answered = read.done() and not read.cancelled() and read.exception() is None and read.result() is not None
        await self._tell(read.result().accepted.request_id if is_answered else "")

    async def _next(self) -> Any:
        """None at the end. Until the id is there a read outlives its reader."""
        try:
            if self._course.live_id:
                return await anext(self._responses, None)
            self._read = asyncio.ensure_future(anext(self._responses, None))
            return await asyncio.shield(self._read)
        except asyncio.CancelledError:  # so grpc.aio reports a cancelled call too, whoever cancelled it
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
        if not self._course.is_over:
            raise await _status_of(self._call)
        return None

    async def _pause(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._left.wait()

    def _drop(self) -> None:
        if self._call is not None:
            self._call.cancel()


async def _status_of(call: Any) -> grpc.aio.AioRpcError:
    """Of a call that has ended."""
    initial, trailing = await call.initial_metadata(), await call.trailing_metadata()
    return grpc.aio.AioRpcError(await call.code(), initial, trailing, await call.details())
