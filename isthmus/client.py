"""A client of the public gRPC service: one generation as a stream of text, and everything about it at the end."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from isthmus.convert import finish_reason_from_proto, token_from_proto
from isthmus.errors import IsthmusError, WorkersUnavailable
from isthmus.rpc import channel
from isthmus.rpc_errors import typed_errors
from isthmus.types import Token
from isthmus.v1 import inference_pb2, inference_pb2_grpc


@dataclass(slots=True)
class Generation:
    """What one call delivered so far. Owned by whoever iterates `Client.generate`."""

    request_id: str = ""
    seed: int = 0
    text: str = ""
    tokens: list[Token] = field(default_factory=list[Token])
    finished: inference_pb2.Finished | None = None

    def add(self, response: inference_pb2.GenerateResponse) -> str:
        """The text this message releases. Raises IsthmusError when token indices do not follow one another."""
        event = response.WhichOneof("event")
        released = ""
        if event == "accepted":
            self.request_id, self.seed = response.accepted.request_id, response.accepted.seed
        elif event == "tokens":
            if response.tokens.index != len(self.tokens):
                raise IsthmusError(f"token index {response.tokens.index} after {len(self.tokens)} tokens")
            self.tokens.extend(token_from_proto(token) for token in response.tokens.tokens)
            released = response.tokens.text
        elif event == "finished":
            self.finished = response.finished
            released = response.finished.text
        self.text += released
        return released

    def as_dict(self) -> dict[str, Any]:
        """For JSON: floats are the fp32 values widened exactly, so that equal bits print equally."""
        finished = self.finished or inference_pb2.Finished()
        reason = finish_reason_from_proto(finished.finish_reason)
        asked = any(token.logprob is not None for token in self.tokens)
        return {
            "request_id": self.request_id,
            "seed": self.seed,
            "text": self.text,
            "token_ids": [token.id for token in self.tokens],
            "logprobs": [_logprob(token) for token in self.tokens] if asked else None,
            "finish_reason": reason.value if reason else None,
            "usage": fields_of(finished.usage),
            "timings": fields_of(finished.timings),
            "workers": fields_of(finished.workers),
        }


class Client:
    """An async context manager holding one channel to a router."""

    def __init__(self, address: str):
        self.address = address
        self._channel = channel(address)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def connect(self, *, timeout_s: float = 3.0) -> None:
        """Raises WorkersUnavailable when nobody answers at the address."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
        except TimeoutError as error:
            raise WorkersUnavailable(f"no router answers at {self.address}") from error

    async def generate(
        self, request: inference_pb2.GenerateRequest, generation: Generation, *, timeout_s: float = 600.0
    ) -> AsyncGenerator[str]:
        """Yields text as it is released and fills `generation`. Raises IsthmusError; closing it cancels the request."""
        call = self._stub.Generate(request, timeout=timeout_s)
        try:
            with typed_errors():
                async for response in call:
                    yield generation.add(response)
        finally:
            call.cancel()


def fields_of(message: Any) -> Mapping[str, Any]:
    """A flat message's fields by name, unset ones included."""
    return {descriptor.name: getattr(message, descriptor.name) for descriptor in message.DESCRIPTOR.fields}


def _logprob(token: Token) -> dict[str, Any]:
    return {"logprob": token.logprob, "top": [{"id": key, "logprob": value} for key, value in token.top_logprobs]}
