"""The driver of a stack's children: it starts them, waits until all serve, restarts what dies, and ends them all.

A stop takes at most five seconds. When a child is started again is decided in restart_policy.py.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from isthmus import log
from isthmus.cli import redis_server
from isthmus.cli.child_process import Child
from isthmus.cli.grpc_probe import GrpcProbe
from isthmus.cli.restart_policy import RestartPolicy, StartPatience
from isthmus.cli.stack_plan import ChildSpec
from isthmus.cli.state_directory import StateDir, start_ticks
from isthmus.clock import LoopClock, SystemClock
from isthmus.config import EXIT_CANNOT_START

_POLL_S = 0.1
_REDIS_START_S = 5.0
_DRAIN_S = 3.8  # services drain for 3 s and close; then they are killed
_REDIS_STOP_S = 0.3
_log = log.get_logger("supervisor")
Probe: TypeAlias = GrpcProbe | redis_server.RedisProbe


class StackFailed(Exception):
    """The stack did not get ready, or cannot go on; the text is for a person."""


@dataclass(frozen=True, slots=True)
class Supervision:
    """How a stack is run."""

    model: str
    given_redis: str | None = None  # the address of one that is not our child
    restart: bool = True
    ready_timeout_s: float = 60.0
    on_waiting: Callable[[Mapping[str, str]], None] = lambda _: None  # who does not serve yet, and why; {} at the end


class Supervisor:
    """Owns the children, and writes the stack's state file. One run per object.

    It runs in the main thread: the kernel sends a child its death signal when the thread that forked it ends.
    """

    def __init__(
        self, specs: Sequence[ChildSpec], state: StateDir, how: Supervision, *, clock: LoopClock = SystemClock()
    ):
        self._children = [Child(spec, state.logs) for spec in specs]
        self._state = state
        self._how = how
        self._clock = clock
        self._is_ready = False
        self._stopping = asyncio.Event()

    async def run(self, on_ready: Callable[[dict[str, Any]], None]) -> None:
        """Runs until a signal comes. Raises StackFailed; whatever happens, no child is left.

        `on_ready` is called once, with the ready object, when all children serve.
        """
        with self._signals():
            try:
                await self._run_until_stopped(on_ready)
            except BaseExceptionGroup as group:
                failed = group.subgroup((StackFailed, BrokenPipeError))
                raise failed.exceptions[0] if failed else group from None
            finally:
                await asyncio.shield(self._end_children())

    def describe(self) -> dict[str, Any]:
        """The ready object: who runs where."""
        redis = self._entries("redis")
        if self._how.given_redis is not None:
            redis.append({"name": "redis", "pid": None, "address": self._how.given_redis})
        return {
            "ready": self._is_ready,
            "supervisor": os.getpid(),
            "model": self._how.model,
            "logs": str(self._state.logs),
            "routers": self._entries("router"),
            "prefill": self._entries("prefill"),
            "decode": self._entries("decode"),
            "redis": redis,
        }

    def _entries(self, role: str) -> list[dict[str, Any]]:
        children = [child for child in self._children if child.spec.role == role]
        return [{"name": child.spec.name, "pid": child.pid, **child.spec.addresses} for child in children]

    async def _run_until_stopped(self, on_ready: Callable[[dict[str, Any]], None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            keepers = [tasks.create_task(self._keep(child)) for child in self._children if child.spec.role == "redis"]
            starting = tasks.create_task(self._get_ready(tasks, keepers, on_ready))
            await self._stopping.wait()
            for task in [starting, *keepers]:
                task.cancel()

    async def _get_ready(
        self, tasks: asyncio.TaskGroup, keepers: list[asyncio.Task[None]], on_ready: Callable[[dict[str, Any]], None]
    ) -> None:
        own_redis = [child for child in self._children if child.spec.role == "redis"]
        await self._wait_serving(own_redis, _REDIS_START_S)
        keepers.extend(tasks.create_task(self._keep(child)) for child in self._children if child not in own_redis)
        await self._wait_serving(self._children, self._how.ready_timeout_s)
        self._is_ready = True
        self._write()
        on_ready(self.describe())

    async def _keep(self, child: Child) -> None:
        """Runs one child, and starts it again whenever it ends. Raises StackFailed for one that cannot start."""
        policy = RestartPolicy()
        while True:
            policy.started(self._clock.now())
            await child.start()
            self._write()
            _log.info("child.started", name=child.spec.name, pid=child.pid)
            status = await child.wait()
            _log.warning("child.ended", name=child.spec.name, status=status)
            self._write()
            if not self._is_ready and (status == EXIT_CANNOT_START or not self._how.restart):
                raise StackFailed(f"{child.spec.name}: {child.last_words()}\nits log: {child.log_path}")
            if not self._how.restart:
                return
            await self._clock.sleep(policy.ended(self._clock.now()))
            child.restarts()

    async def _wait_serving(self, children: Sequence[Child], timeout_s: float) -> None:
        """Raises StackFailed naming who does not serve, why, and where its log is."""
        patience = StartPatience(timeout_s, self._clock.now())
        async with contextlib.AsyncExitStack() as opened:
            waiting = {child: await opened.enter_async_context(_probe(child)) for child in children}
            while waiting := await _not_serving(waiting):
                if patience.is_over(self._clock.now()):
                    reasons = [await _why_not(child, probe) for child, probe in waiting.items()]
                    raise StackFailed("\n".join([f"not serving after {timeout_s:g} s:", *reasons]))
                if patience.is_tried(self._clock.now()):
                    self._how.on_waiting({child.spec.name: await probe.reason() for child, probe in waiting.items()})
                await self._clock.sleep(_POLL_S)
        self._how.on_waiting({})

    async def _end_children(self) -> None:
        """Services first, all at once; Redis when nobody needs it any more."""
        services = [child for child in self._children if child.spec.role != "redis"]
        await _end(services, _DRAIN_S)
        await _end([child for child in self._children if child not in services], _REDIS_STOP_S)

    def _write(self) -> None:
        restarts = {child.spec.name: child.num_restarts for child in self._children}
        self._state.write({**self.describe(), "restarts": restarts, "supervisor_start": start_ticks()})

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def _probe(child: Child) -> Probe:
    if child.spec.address is not None:
        return redis_server.RedisProbe(child.spec.address)
    assert child.spec.grpc is not None, "a service has a port"
    return GrpcProbe(child.spec.grpc)


async def _not_serving(waiting: Mapping[Child, Probe]) -> dict[Child, Probe]:
    answers = await asyncio.gather(*(probe.is_serving() for probe in waiting.values()))
    serving = {child for child, serves in zip(waiting, answers, strict=True) if serves}
    return {child: probe for child, probe in waiting.items() if child not in serving}


async def _why_not(child: Child, probe: Probe) -> str:
    ended = f"it ended {child.num_restarts} times, at last with: {child.last_words()}" if child.num_restarts else ""
    return f"{child.spec.name}: {ended or await probe.reason()}; its log: {child.log_path}"


async def _end(children: Sequence[Child], timeout_s: float) -> None:
    """SIGTERM to all at once, and SIGKILL to those that are left when the time is up."""
    alive = [child for child in children if child.pid is not None]
    for child in alive:
        child.send(signal.SIGTERM)
    waits = [asyncio.create_task(child.wait()) for child in alive]
    if not waits:
        return
    _, left = await asyncio.wait(waits, timeout=timeout_s)
    for child in alive:
        if child.pid is not None:
            _log.warning("child.killed", name=child.spec.name)
            child.send(signal.SIGKILL)
    if left:
        await asyncio.wait(left, timeout=1.0)
