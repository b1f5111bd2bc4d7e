"""The asyncio client: a driver of the client's cores for one event loop."""

import asyncio
import weakref
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from isthmus.client.asyncio_stream import AsyncStream
from isthmus.client.client_core import ClientCore
from isthmus.client.generation import Generation
from isthmus.client.options import GenerateOptions, Message
from isthmus.client.question import AnswerT, Question, detokenize, list_models, tokenize
from isthmus.client.retries import ROUTER_TIMEOUT_S
from isthmus.client.router_call import RouterCall
from isthmus.client.rpc_failure import failure_of
from isthmus.clock import LoopClock, SystemClock
from isthmus.errors import WorkersUnavailable
from isthmus.ids import Ids, SystemIds
from isthmus.process.rpc import channel
from isthmus.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """An async context manager that holds one connection to each router. For one event loop.

    `routers`: host:port addresses, a sequence or separated by commas. `router_timeout_s`: how long a request that no
    router has taken yet looks for one. Raises ValueError when no router is named.
    """

    def __init__(
        self,
        routers: str | Sequence[str],
        *,
        router_timeout_s: float = ROUTER_TIMEOUT_S,
        clock: LoopClock = SystemClock(),
        ids: Ids = SystemIds(),
    ):
        self._core = ClientCore(routers, ids, router_timeout_s=router_timeout_s)
        self._clock = clock
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
        """Cancels what still runs, and closes the connections."""
        await asyncio.gather(*(stream.aclose() for stream in list(self._streams)))
        await asyncio.gather(*self._background, return_exceptions=True)
        for opened in self._channels.values():
            await opened.close()

    async def connect(self, *, timeout_s: float = 3.0) -> None:
        """Not needed, but tells at once. Raises WorkersUnavailable when no router answers."""
        routers = self._core.routers
        ready = [asyncio.create_task(self._channel(router.address).channel_ready()) for router in routers.all]
        done, waiting = await asyncio.wait(ready, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in waiting:
            task.cancel()
        if not done:
            raise WorkersUnavailable(f"no router answers at {routers.names}")

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """A stream of one generation, sent to a router when the stream is first read.

        The timeout begins now. Raises InvalidRequest for what a request cannot hold.
        """
        life = self._core.generation(prompt, options, self._clock.now())
        stream = AsyncStream(life, self._call, self._in_background, self._clock)
        self._streams.add(stream)
        return stream

    async def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Reads a stream to its end. Raises IsthmusError."""
        stream = self.generate(prompt, **options)
        async for _ in stream:
            pass
        return stream.result

    async def list_models(self) -> list[inference_pb2.Model]:
        """The models that the routers serve. Raises IsthmusError."""
        return await self._ask(list_models())

    async def tokenize(self, prompt: str | None = None, *, chat: Sequence[Message] | None = None) -> list[int]:
        """The token ids of a text, or of a chat's rendered text. Raises IsthmusError."""
        return await self._ask(tokenize(prompt, chat))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids. Raises IsthmusError."""
        return await self._ask(detokenize(token_ids))

    def _call(self, call: RouterCall) -> Any:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel(call.address))
        return getattr(stub, call.method)(call.message, timeout=call.timeout_s)

    async def _ask(self, question: Question[AnswerT]) -> AnswerT:
        life = self._core.question(question, self._clock.now())
        while True:
            call = life.next_call(self._clock.now())
            try:
                return question.read(await self._call(call))
            except grpc.RpcError as error:
                delay_s = life.failed(failure_of(error), self._clock.now())
            await self._clock.sleep(delay_s)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:  # made here: a channel belongs to the loop that runs when it is made
            self._channels[address] = channel(address)
        return self._channels[address]

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins bounded work that its caller does not wait for; `close` does."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
