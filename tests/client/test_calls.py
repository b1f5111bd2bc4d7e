"""The calls around generation, and the first words to a router."""

import asyncio
from typing import Any

import pytest

from isthmus.client import AsyncClient, Client
from isthmus.errors import InvalidRequest, Overloaded, WorkersUnavailable
from isthmus.v1 import inference_pb2
from tests.client.routers import Router, addresses


class Speller(Router):
    """Tokens are code points; the first call is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.is_refusing = True

    async def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:  # noqa: N802
        if self.is_refusing:
            self.is_refusing = False
            raise Overloaded("full", retry_after_s=0.01)
        text = request.prompt or "".join(f"{one.role}:{one.content};" for one in request.chat.messages)
        return inference_pb2.TokenizeResponse(token_ids=[ord(letter) for letter in text])

    async def Detokenize(self, request: Any, context: Any) -> inference_pb2.DetokenizeResponse:  # noqa: N802
        if not request.token_ids:
            raise InvalidRequest.of("token_ids", [], "some")
        return inference_pb2.DetokenizeResponse(text="".join(chr(one) for one in request.token_ids))

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:  # noqa: N802
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="m", vocab_size=7)])


async def test_calls_around_generation_pass_over_an_absent_router() -> None:
    async with addresses(Speller()) as routers, AsyncClient(["127.0.0.1:1", *routers]) as client:
        assert await client.tokenize("ab") == [97, 98]
        assert await client.tokenize(chat=[{"role": "user", "content": "x"}]) == [ord(one) for one in "user:x;"]
        assert await client.detokenize([97, 98]) == "ab"
        assert [(model.id, model.vocab_size) for model in await client.list_models()] == [("m", 7)]
        with pytest.raises(InvalidRequest):
            await client.detokenize([])


async def test_calls_around_generation_from_a_thread() -> None:
    def ask(routers: list[str]) -> tuple[list[int], list[int], str, list[str]]:
        with Client(["127.0.0.1:1", *routers]) as client:
            chat = [{"role": "user", "content": "x"}]
            models = [model.id for model in client.list_models()]
            return client.tokenize("ab"), client.tokenize(chat=chat), client.detokenize([97, 98]), models

    async with addresses(Speller()) as routers:
        answers = await asyncio.to_thread(ask, routers)
    assert answers == ([97, 98], [ord(one) for one in "user:x;"], "ab", ["m"])


async def test_connect_is_satisfied_by_one_router() -> None:
    async with addresses(Router()) as routers, AsyncClient(["127.0.0.1:1", *routers]) as client:
        await client.connect()
    async with AsyncClient("127.0.0.1:1,127.0.0.1:2") as client:
        with pytest.raises(WorkersUnavailable, match=r"no router answers at 127.0.0.1:1, 127.0.0.1:2"):
            await client.connect(timeout_s=0.2)
