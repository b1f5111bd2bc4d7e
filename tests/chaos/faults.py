"""What may befall a stack: one type per fault, and the seeded hand that picks them."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis.asyncio

from isthmus.testing.processes import SERVES_AGAIN_S, serves, status_or_none
from isthmus.testing.stack import Stack, until
from tests.chaos.ledgers import save_ledger
from tests.chaos.quiet import opened_redis

SERVICES = ("routers", "prefill", "decode")
_ROLES = {"routers": "router"}
FROZEN_S = 5.0
REDIS_STOPPED_S = 2.0
REDIS_PAUSED_MS = 500


class Fault(Protocol):
    """Acts on one process of a pool; returns when the fault itself is over, not when the process serves again."""

    name: str
    pools: tuple[str, ...]

    async def inject(self, stack: Stack, process: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL; the supervisor starts it anew, Redis with nothing in it."""

    name: str = "kill"
    pools: tuple[str, ...] = (*SERVICES, "redis")

    async def inject(self, stack: Stack, process: str) -> None:
        stack.send(process, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Restart:
    """SIGTERM, as an operator does: the process drains and its successor starts."""

    name: str = "restart"
    pools: tuple[str, ...] = SERVICES

    async def inject(self, stack: Stack, process: str) -> None:
        stack.send(process, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Freeze:
    """SIGSTOP, then SIGCONT: longer than it takes to be taken for lost, so that a zombie wakes. Redis: a short one."""

    name: str = "freeze"
    pools: tuple[str, ...] = (*SERVICES, "redis")

    async def inject(self, stack: Stack, process: str) -> None:
        stack.send(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(REDIS_STOPPED_S if process == "redis" else FROZEN_S)
        finally:
            stack.send(process, signal.SIGCONT)


@dataclass(frozen=True, slots=True)
class Flush:
    name: str = "flush"
    pools: tuple[str, ...] = ("redis",)

    async def inject(self, stack: Stack, process: str) -> None:
        async with opened_redis(stack) as client:
            await client.flushall()


@dataclass(frozen=True, slots=True)
class Pause:
    """Redis answers nobody for half a second."""

    name: str = "pause"
    pools: tuple[str, ...] = ("redis",)

    async def inject(self, stack: Stack, process: str) -> None:
        async with opened_redis(stack) as client:
            await client.client_pause(REDIS_PAUSED_MS)
        await asyncio.sleep(REDIS_PAUSED_MS / 1000)


FAULTS: tuple[Fault, ...] = (Kill(), Restart(), Freeze(), Flush(), Pause())


@dataclass(slots=True)
class Injected:
    """One fault as it happened; monotonic seconds."""

    kind: str  # e.g. "kill decode"
    process: str
    at: float
    served_at: float = 0.0  # when the process served again, known to the routers


@dataclass(slots=True)
class Chaos:
    """Injects faults, each kind in turn in a random order; several may last at once, but never in both processes of a

    pool: a pool keeps one that serves. A fault's process is spared until it serves again.
    """

    stack: Stack
    rng: random.Random
    injected: list[Injected]  # grows
    pace_s: float = 3.5
    _down: set[str] = field(default_factory=set[str])

    async def run(self, seconds: float) -> None:
        """Returns when the time is over and everything serves again. Raises AssertionError if something does not."""
        deadline = time.monotonic() + seconds
        bag: list[tuple[Fault, str]] = []
        async with asyncio.TaskGroup() as running:
            while (now := time.monotonic()) < deadline:
                bag = bag or self._shuffled()
                chosen = next((entry for entry in bag if self._standing(entry[1])), None)
                if chosen is not None:
                    bag.remove(chosen)
                    running.create_task(self._befall(*chosen))
                await asyncio.sleep(min(self.pace_s if chosen else 0.1, deadline - now))

    def _shuffled(self) -> list[tuple[Fault, str]]:
        bag = [(fault, pool) for fault in FAULTS for pool in fault.pools]
        self.rng.shuffle(bag)
        return bag

    def _standing(self, pool: str) -> list[dict[str, Any]]:
        """The processes of a pool that may be faulted now: none if only one serves, but for Redis, which may go."""
        up = [entry for entry in self.stack.ready[pool] if entry["name"] not in self._down]
        return up if len(up) > 1 or pool == "redis" else []

    async def _befall(self, fault: Fault, pool: str) -> None:
        process = self.rng.choice(self._standing(pool))
        name = process["name"]
        self._down.add(name)
        before = await _incarnation(process)
        if fault.name in ("kill", "restart"):  # its ledger goes with it
            await save_ledger(self.stack, process, f".{len(self.injected)}")
        one = Injected(f"{fault.name} {_ROLES.get(pool, pool)}", name, time.monotonic())
        self.injected.append(one)
        await fault.inject(self.stack, name)
        is_new = fault.name in ("kill", "restart")
        await until(_back(self.stack, process, pool, before if is_new else None), SERVES_AGAIN_S, f"{name} serves")
        one.served_at = time.monotonic()
        self._down.remove(name)


def _back(stack: Stack, process: dict[str, Any], pool: str, gone: str | None) -> Callable[[], Awaitable[bool]]:
    """Whether a process serves, one that is not the incarnation `gone`."""

    async def back() -> bool:
        if pool == "redis":
            return await _redis_answers(stack)
        return await _incarnation(process) not in (None, gone) and await serves(
            stack, process["name"], process["grpc"], pool
        )

    return back


async def _incarnation(process: dict[str, Any]) -> str | None:
    seen = await status_or_none(process["grpc"]) if "grpc" in process else None
    return seen.incarnation if seen else None


async def _redis_answers(stack: Stack) -> bool:
    try:
        async with opened_redis(stack) as client:
            return await client.ping()
    except redis.asyncio.RedisError:
        return False


def counts(faults: Sequence[Injected]) -> str:
    kinds = sorted({fault.kind for fault in faults})
    return ", ".join(f"{sum(fault.kind == kind for fault in faults)} {kind}" for kind in kinds)
