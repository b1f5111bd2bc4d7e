"""Sessions that break, takeovers and moves in any order, as one seed decides: the client sees every token once."""

import random
from dataclasses import replace

import pytest

from isthmus.convert import token_from_proto
from isthmus.types import Request, Token
from isthmus.v1 import decode_pb2
from tests.decode.world import RETAIN, SEEDED, Router, World, oracle, request, world


class Reader:
    """What a client has of one stream, whoever brings it."""

    def __init__(self, here: World, asked: Request, router: Router):
        self.here, self.asked, self.router = here, asked, router
        self.at, self.counter = 0, 1
        self.tokens: list[Token] = []
        self.is_over = False

    async def read(self, router: Router) -> decode_pb2.SessionResponse:
        message = await router._hear()
        for part in message.step.streams:
            assert part.index <= len(self.tokens), f"a gap before {part.index}"
            for index, token in enumerate(map(token_from_proto, part.tokens), part.index):
                assert self.tokens[index : index + 1] in ([], [token]), f"token {index} changed"
                if index == len(self.tokens):
                    self.tokens.append(token)
        self.is_over |= message.WhichOneof("message") == "ended" and router is self.router
        return message

    async def until(self, router: Router, *kinds: str) -> decode_pb2.SessionResponse:
        while (message := await self.read(router)).WhichOneof("message") not in kinds:
            pass
        return message

    async def blip(self) -> None:
        await self.router.lose()
        hello = await self.router.connect(**{self.asked.request_id: len(self.tokens)})
        assert not hello.unknown_streams

    async def takeover(self) -> None:
        self.router = await self.here.router(self.at)
        self.counter = (await self.router.attach(self.asked.request_id, len(self.tokens))).attach.counter

    async def move(self) -> None:
        if len(self.tokens) == self.asked.sampling.max_tokens:
            return
        target = await self.here.router(1 - self.at, self.router.incarnation)
        known = replace(self.asked, emitted_token_ids=tuple(token.id for token in self.tokens))
        terms = {"on_disconnect": RETAIN, "retention_s": 30, "moves": True}
        reserved = await target.reserve(known, counter=self.counter + 1, **terms)
        move = decode_pb2.Move(request_id=self.asked.request_id, attach=self.router.key(self.counter), target=reserved)
        self.router.say(move=move)
        if (await self.until(self.router, "moved")).moved.acked:
            self.router, self.at, self.counter = target, 1 - self.at, self.counter + 1
            return
        target.say(cancel={"request_id": self.asked.request_id, "attach": target.key(self.counter + 1)})
        await target.until("ended")


@pytest.mark.parametrize("seed", range(12))
async def test_no_token_is_lost_repeated_or_changed(seed: int) -> None:
    rng = random.Random(seed)
    asked = request(rng.randint(1, 80), replace(SEEDED, max_tokens=100))
    async with world("d1", "d2") as here:
        reader = Reader(here, asked, await here.router())
        await reader.router.start(here.prefill, asked, on_disconnect=RETAIN, retention_s=30)
        while not reader.is_over:
            for _ in range(rng.randint(1, 12)):
                if not reader.is_over:
                    await reader.read(reader.router)
            if not reader.is_over:
                await rng.choice([reader.blip, reader.takeover, reader.move])()
        assert reader.tokens == oracle(asked), f"seed {seed}"
