"""One generation read in an event loop: the driver of a GenerationLife over grpc.aio."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from isthmus.client.generation import Chunk, Generation
from isthmus.client.generation_life import ID_TIMEOUT_S, DropCall, GenerationLife, Pause, ReadResponse
from isthmus.client.router_call import RouterCall
from isthmus.client.rpc_failure import failure_of
from isthmus.clock import LoopClock


class AsyncStream:
    """One generation. Iterating gives text, `chunks` gives tokens; leaving either before the end cancels the request.

    `result` fills while it is read. As an async context manager it is closed at the end of the block.
    """

    def __init__(
        self,
        life: GenerationLife,
        call: Callable[[RouterCall], Any],
        in_background: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        clock: LoopClock,
    ):
        self._life = life
        self._make_call = call
        self._in_background = in_background
        self._clock = clock
        self._call: Any = None
        self._responses: Any = None
        self._first_read: asyncio.Task[Chunk | None] | None = None  # of the open call, while the id is not known
        self._telling: asyncio.Task[None] | None = None
        self._is_cancelled = asyncio.Event()

    @property
    def result(self) -> Generation:
        """What was delivered so far."""
        return self._life.generation

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
        try:
            while (step := self._life.next_step(self._clock.now())) is not None:
                match step:
                    case RouterCall():
                        self._call = self._make_call(step)
                        self._responses = aiter(self._call)
                    case ReadResponse():
                        chunk = await self._read()
                        if chunk is not None:
                            yield chunk
                    case Pause():
                        await self._pause(step.seconds)
                    case DropCall():
                        self._drop()
        finally:
            await self.aclose()

    async def cancel(self) -> None:
        """Ends the request wherever it runs. Who reads the stream gets what was made before, then its end."""
        if not self._life.cancel():
            return
        self._is_cancelled.set()
        if self._life.awaits_id and self._first_read is not None:
            self._telling = self._in_background(self._tell_when_known(self._first_read))
        else:
            await self._tell_routers()

    async def aclose(self) -> None:
        """Cancels the generation unless it has ended."""
        await self.cancel()
        if self._telling is None:
            self._drop()
        else:
            self._telling.add_done_callback(lambda _: self._drop())

    async def _read(self) -> Chunk | None:
        """Until the id is known, a read outlives its reader: without the id nobody could end the request."""
        if not self._life.awaits_id:
            return await self._receive()
        self._first_read = asyncio.create_task(self._receive())
        return await asyncio.shield(self._first_read)

    async def _receive(self) -> Chunk | None:
        try:
            response = await anext(self._responses, None)
        except asyncio.CancelledError:  # so grpc.aio reports a cancelled call too, whoever cancelled it
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            failure = failure_of(await _status_of(self._call))
        except grpc.RpcError as error:
            failure = failure_of(error)
        else:
            return self._life.received(response, self._clock.now())
        self._life.call_ended(failure, self._clock.now())
        return None

    async def _tell_when_known(self, first_read: asyncio.Task[Chunk | None]) -> None:
        """The id may be on its way."""
        await asyncio.wait({first_read}, timeout=ID_TIMEOUT_S)
        if first_read.done() and not first_read.cancelled():
            first_read.exception()  # its reader has left
        await self._tell_routers()

    async def _tell_routers(self) -> None:
        """Lets go of the call when no router knew the request; else the router ends it."""
        cancellation = self._life.cancellation(self._clock.now())
        while (call := cancellation.next_call(self._clock.now())) is not None:
            with contextlib.suppress(grpc.RpcError):
                cancellation.answered(await self._make_call(call))
        if not cancellation.was_known:
            self._drop()

    async def _pause(self, seconds: float) -> None:
        """Returns early when the generation is cancelled."""
        with contextlib.suppress(TimeoutError):
            async with self._clock.timeout(seconds):
                await self._is_cancelled.wait()

    def _drop(self) -> None:
        if self._call is not None:
            self._call.cancel()


async def _status_of(call: Any) -> grpc.aio.AioRpcError:
    """How a call that has ended did end."""
    initial = await call.initial_metadata()
    trailing = await call.trailing_metadata()
    return grpc.aio.AioRpcError(await call.code(), initial, trailing, await call.details())
