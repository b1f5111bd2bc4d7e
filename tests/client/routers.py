"""Routers that play what a test says: real servers on real ports."""

import asyncio
import contextlib
import struct
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from isthmus.process.rpc import bind_grpc, create_server
from isthmus.testing.relay import Relay, relayed_port
from isthmus.v1 import inference_pb2, inference_pb2_grpc, types_pb2

LENGTH = 12


def logprob(index: int) -> float:
    return struct.unpack("<f", struct.pack("<f", -0.1 * index))[0]


def token(seed: int, index: int) -> types_pb2.Token:
    """Generation as a function of seed and index."""
    top = [types_pb2.TopLogprob(id=index, logprob=logprob(index))]
    return types_pb2.Token(id=(seed + 7919 * index) % 4093, logprob=logprob(index), top_logprobs=top)


def whole_text() -> str:
    return "".join(f"<{index}>" for index in range(LENGTH)) + "!"


def accepted(request_id: str, seed: int, *, numerics: str = "n") -> inference_pb2.GenerateResponse:
    message = inference_pb2.Accepted(request_id=request_id, seed=seed, model_digest="m", numerics_digest=numerics)
    return inference_pb2.GenerateResponse(accepted=message)


def chunk(seed: int, start: int, end: int) -> inference_pb2.GenerateResponse:
    tokens = [token(seed, index) for index in range(start, end)]
    text = "".join(f"<{index}>" for index in range(start, end))
    return inference_pb2.GenerateResponse(tokens=inference_pb2.TokenChunk(index=start, tokens=tokens, text=text))


def finished() -> inference_pb2.GenerateResponse:
    usage = inference_pb2.Usage(num_prompt_tokens=3, num_generated_tokens=LENGTH)
    message = inference_pb2.Finished(finish_reason=types_pb2.FINISH_REASON_LENGTH, usage=usage, text="!")
    return inference_pb2.GenerateResponse(finished=message)


@dataclass
class Asked:
    """One call that a router got."""

    request: Any
    context: Any
    ended: asyncio.Event

    @property
    def is_resume(self) -> bool:
        return isinstance(self.request, inference_pb2.ResumeRequest)


@dataclass
class Told:
    """What a script may use: the call, its seed, and how many tokens the client has."""

    router: "Router"
    asked: Asked
    seed: int
    position: int
    request_id: str

    async def abort(self, code: grpc.StatusCode) -> None:
        """Ends the call without details, as the C core does."""
        await self.asked.context.abort(code, "made up")


Script = Callable[[Told], AsyncIterator[inference_pb2.GenerateResponse]]


class Router(inference_pb2_grpc.InferenceServiceServicer):
    """Each call plays the next script; when none is left, the generation to its end."""

    def __init__(self, *scripts: Script, name: str = "r"):
        self.scripts = deque(scripts)
        self.name = name
        self.seed = 0
        self.asked: list[Asked] = []
        self.cancelled: list[str] = []
        self.cancels = asyncio.Event()
        self.silent = asyncio.Event()  # a script has said all it says

    @property
    def kinds(self) -> str:
        return "".join("R" if one.is_resume else "G" for one in self.asked)

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:  # noqa: N802
        self.seed = request.sampling.seed
        request_id = f"{self.name}-{len(self.asked)}"
        async for response in self._play(request, context, len(request.emitted_token_ids), request_id):
            yield response

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.ResumeResponse]:  # noqa: N802
        async for response in self._play(request, context, request.next_index, request.request_id):
            yield inference_pb2.ResumeResponse.FromString(response.SerializeToString())

    async def Cancel(self, request: Any, context: Any) -> inference_pb2.CancelResponse:  # noqa: N802
        self.cancelled.append(request.request_id)
        self.cancels.set()
        return inference_pb2.CancelResponse(found=True)

    async def _play(
        self, request: Any, context: Any, position: int, request_id: str
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        asked = Asked(request, context, asyncio.Event())
        self.asked.append(asked)
        script = self.scripts.popleft() if self.scripts else to_the_end
        try:
            async for response in script(Told(self, asked, self.seed, position, request_id)):
                yield response
        finally:
            asked.ended.set()


async def to_the_end(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
    yield accepted(told.request_id, told.seed)
    for index in range(told.position, LENGTH):
        yield chunk(told.seed, index, index + 1)
    yield finished()


def breaks(code: grpc.StatusCode, *, after: int) -> Script:
    """Ends without a word of the router's after so many tokens."""

    async def script(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, told.position, told.position + after)
        await told.abort(code)

    return script


def refuses(error: Exception, *, after: int | None = None) -> Script:
    """Raises a typed error at once, or after `accepted` and so many tokens."""

    async def script(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        if after is not None:
            yield accepted(told.request_id, told.seed)
        if after:
            yield chunk(told.seed, told.position, told.position + after)
        raise error

    return script


def hangs(*, after: int) -> Script:
    """Says nothing more after so many tokens, and goes when its caller goes."""

    async def script(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        for index in range(told.position, told.position + after):
            yield chunk(told.seed, index, index + 1)
        told.router.silent.set()
        await asyncio.Event().wait()

    return script


@contextlib.asynccontextmanager
async def serving(servicer: inference_pb2_grpc.InferenceServiceServicer, port: int = 0) -> AsyncGenerator[int]:
    """The port."""
    server = create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    bound = bind_grpc(server, "127.0.0.1", port)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def relayed(servicer: Router) -> AsyncGenerator[tuple[Relay, str]]:
    """A relay before a router, and the relay's address."""
    async with serving(servicer) as port, relayed_port(port) as relay:
        yield relay


@contextlib.asynccontextmanager
async def addresses(*servicers: Router) -> AsyncGenerator[list[str]]:
    async with contextlib.AsyncExitStack() as held:
        ports = [await held.enter_async_context(serving(servicer)) for servicer in servicers]
        yield [f"127.0.0.1:{port}" for port in ports]
