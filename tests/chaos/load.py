"""The load under the faults: users of the client library that send one request after another and note all they hear."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.client import AsyncClient
from isthmus.errors import IsthmusError
from isthmus.testing.stack import Stack
from tests.chaos.history import GRACE_S, Oracle, Record
from tests.e2e.prompts import TEXT_PROMPTS

DEADLINE_S = 120.0  # of each request: far above what any of them takes, faults included
_HUNG_S = DEADLINE_S + 2 * GRACE_S
_AFTER_FAILURE_S = 1.0  # a run that has failed anyway need not fail a thousand times
_GREEDY, _SEEDED = {"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.95}
_LONG = TEXT_PROMPTS[11] * 6  # about 700 tokens
_CHAT = [
    {"role": "user", "content": "My name is Anna."},
    {"role": "assistant", "content": "Hello, Anna!"},
    {"role": "user", "content": "What is my name?"},
]


@dataclass(frozen=True, slots=True)
class Spec:
    """A request, and the name under which its oracle is known."""

    name: str
    options: dict[str, Any]


def specs() -> list[Spec]:
    """Twelve: greedy and seeded, prompts of 2 to 700 tokens, 8 to 250 generated ones; all with logprobs."""
    drawn: list[dict[str, Any]] = [
        {"prompt": TEXT_PROMPTS[0], "max_tokens": 250, **_GREEDY, "ignore_eos": True},
        {"prompt": TEXT_PROMPTS[6], "max_tokens": 250, **_SEEDED, "seed": 1, "repetition_penalty": 1.2},
        {"prompt": TEXT_PROMPTS[13], "max_tokens": 220, **_SEEDED, "seed": 2, "ignore_eos": True},
        {"prompt": _LONG, "max_tokens": 150, **_GREEDY, "ignore_eos": True},
        {"prompt": _LONG[40:], "max_tokens": 180, **_SEEDED, "seed": 3, "presence_penalty": 0.5, "ignore_eos": True},
        {"prompt": TEXT_PROMPTS[18], "max_tokens": 150, **_GREEDY, "frequency_penalty": 0.3, "ignore_eos": True},
        {"chat": _CHAT, "max_tokens": 100, **_SEEDED, "seed": 4, "top_k": 40},
        {"prompt": TEXT_PROMPTS[1], "max_tokens": 100, **_GREEDY, "ignore_eos": True},
        {"prompt": TEXT_PROMPTS[14], "max_tokens": 200, **_SEEDED, "seed": 5, "stop": ["ness", "harbor"]},
        {"prompt": TEXT_PROMPTS[4], "max_tokens": 60, **_GREEDY, "min_tokens": 10},
        {"prompt": TEXT_PROMPTS[8], "max_tokens": 40, **_SEEDED, "seed": 6, "min_p": 0.02, "ignore_eos": True},
        {"prompt": _LONG[:1500], "max_tokens": 8, **_GREEDY},
    ]
    return [Spec(f"spec {number}", {**options, "logprobs": 2}) for number, options in enumerate(drawn)]


async def learn_oracles(client: AsyncClient, asked: Sequence[Spec], known: dict[str, Oracle]) -> None:
    """Adds what specs not known yet give on a stack nobody disturbs."""
    unknown = [spec for spec in asked if spec.name not in known]
    records = await asyncio.gather(*(one(client, spec) for spec in unknown))
    known.update({record.spec: Oracle.of(record) for record in records})


@dataclass(slots=True)
class Load:
    """Users that go on until the block ends; then each finishes what it has begun. Owner of the records."""

    clients: Sequence[AsyncClient]
    asked: Sequence[Spec]
    rng: random.Random
    num_users: int = 16
    records: list[Record] = field(default_factory=list[Record])
    _tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])
    _over: bool = False

    async def __aenter__(self) -> "Load":
        self._tasks = [asyncio.create_task(self._user(number)) for number in range(self.num_users)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over = True
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)

    async def _user(self, number: int) -> None:
        client = self.clients[number % len(self.clients)]
        while not self._over:
            record = await one(client, self.rng.choice(self.asked), self.records)
            if record.failed:
                await asyncio.sleep(_AFTER_FAILURE_S)

    def volume(self) -> str:
        return f"{len(self.records)} streams, {sum(len(record.tokens) for record in self.records)} tokens"


async def one(client: AsyncClient, spec: Spec, records: list[Record] | None = None) -> Record:
    """One request to its end. A stream that says nothing more has no end in its record."""
    record = Record(spec.name, time.monotonic(), DEADLINE_S)
    if records is not None:
        records.append(record)
    stream = client.generate(**spec.options, timeout_s=DEADLINE_S)
    try:
        async with asyncio.timeout(_HUNG_S):
            async for chunk in stream.chunks():
                record.request_ids = stream.result.request_ids
                record.hear(chunk.index, chunk.tokens, chunk.text, time.monotonic())
            reason = stream.result.finish_reason
            record.end(reason.value if reason else "error: neither an end nor an error", time.monotonic())
    except TimeoutError:
        pass
    except IsthmusError as error:
        record.end(f"error: {type(error).__name__}: {error.detail}", time.monotonic())
    record.request_ids = stream.result.request_ids
    return record


def clients_of(stack: Stack) -> list[AsyncClient]:
    """One for each router, which it asks first."""
    routers = stack.routers
    return [AsyncClient(routers[number:] + routers[:number]) for number in range(len(routers))]
