"""The life of a service process: settings, ports, health from the first moment, work, signal, drain, close."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import NoReturn

import grpc.aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from isthmus import log
from isthmus.clock import Clock
from isthmus.config import EXIT_CANNOT_START, ConfigT, ServiceConfig, load
from isthmus.errors import CannotStart
from isthmus.process.admin import ADMIN_SERVICE, AdminServicer, Identity, ServiceHooks
from isthmus.process.grpc_health import HealthServicer
from isthmus.process.health import HealthState
from isthmus.process.http import http_health
from isthmus.process.rpc import INTERNAL_RECEIVE_BYTES, bind_grpc, create_server
from isthmus.v1 import admin_pb2_grpc

DRAIN_S = 3.0  # the whole stack is gone within 5 s of SIGTERM
_DRAIN_POLL_S = 0.01
_CLOSE_S = 1.0
_RPC_GRACE_S = 0.1
_HEALTH_LOG_S = 0.25
_log = log.get_logger("serving")


@dataclass(frozen=True, slots=True)
class Face:
    """What a process shows. Its servicers answer before the work is ready, so they look up what the work makes."""

    config: ServiceConfig
    identity: Identity
    health: HealthState
    hooks: ServiceHooks
    clock: Clock
    service: str  # full name of its gRPC service, added by
    register: Callable[[grpc.aio.Server], None]
    max_receive_bytes: int = INTERNAL_RECEIVE_BYTES


class Stop:
    """The process's end, asked for by a signal or by the service itself. Any thread may ask."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked = asyncio.Event()
        self._block: asyncio.Timeout | None = None
        self.error: BaseException | None = None

    def request(self, error: BaseException | None = None) -> None:
        """With an error: it ends the process with a non-zero status, without drain."""
        self._loop.call_soon_threadsafe(self._request, error)

    async def wait(self) -> None:
        await self._asked.wait()

    @contextlib.asynccontextmanager
    async def hurrying(self, timeout_s: float | None = None) -> AsyncGenerator[asyncio.Timeout]:
        """The block is cancelled, and left as usual, when it takes too long or when the end is asked for meanwhile."""
        self._block = block = asyncio.timeout(timeout_s)
        try:
            async with block:
                yield block
        except TimeoutError:
            if not block.expired():
                raise
        finally:
            self._block = None

    def _request(self, error: BaseException | None) -> None:
        self.error = self.error or error
        self._asked.set()
        if self._block is not None and not self._block.expired():
            self._block.reschedule(self._loop.time())


Work = Callable[[Stop], AbstractAsyncContextManager[None]]


def run_service(config_class: type[ConfigT], main: Callable[[ConfigT], Coroutine[None, None, None]]) -> NoReturn:
    """The whole process, from its flags to its end; skips the interpreter's teardown, seconds once torch is loaded."""
    status = exit_status(config_class, main, sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_status(
    config_class: type[ConfigT], main: Callable[[ConfigT], Coroutine[None, None, None]], argv: Sequence[str]
) -> int:
    """The exit status: 0 after a drain, 2 if the process cannot start (one line on stderr says why), 1 for all else."""
    try:
        config = load(config_class, argv)
        log.configure(config.name, config.log_level)
        asyncio.run(main(config))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001 - the process's root
        refusal = _find_refusal(error)
        if refusal is None:
            _log.exception("process.failed", error)
            return 1
        sys.stderr.write(f"isthmus {config_class.role}: {refusal}\n")
        return EXIT_CANNOT_START
    return 0


async def serve_until_signal(face: Face, work: Work) -> None:
    """Opens the ports, enters `work(stop)`, waits for SIGTERM, SIGINT or `stop.request()`, drains, closes.

    The ports answer (NOT_SERVING, "starting") while `work` is being entered; it calls `health.ready()` itself.
    Raises what `work` raised, or the error given to `stop.request`.
    """
    stop = Stop()
    admin = AdminServicer(face.identity, face.health, face.hooks, face.clock)
    face.hooks.metrics.watch_status(admin.current_status)
    with _signals(stop):
        async with _open_ports(face, admin) as server, contextlib.AsyncExitStack() as entered:
            async with stop.hurrying() as entering:
                await entered.enter_async_context(work(stop))
            await stop.wait()
            if stop.error is None and not entering.expired():
                await _drain(stop, admin)
            await server.stop(_RPC_GRACE_S)  # before the work closes: no handler may outlive what it uses
            async with stop.hurrying(_CLOSE_S) as closing:
                await entered.aclose()
            if closing.expired():
                _log.warning("service.late")
    _log.info("service.closed")
    if stop.error is not None:
        raise stop.error


async def until_none_left(num_left: Callable[[], int], timeout_s: float) -> int:
    """For drains: returns when nothing is left or the time is over; how many are left then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            while num_left():  # noqa: ASYNC110 - once in a process's life: not worth an event kept at every change
                await asyncio.sleep(_DRAIN_POLL_S)
    return num_left()


async def _drain(stop: Stop, admin: AdminServicer) -> None:
    """Asked for the end once more, the process closes without waiting for what still runs."""
    _log.info("service.draining")
    num_left = None
    async with stop.hurrying(DRAIN_S + _RPC_GRACE_S):
        num_left = await admin.drain(DRAIN_S)
    _log.info("service.drained", num_left=num_left)


@contextlib.asynccontextmanager
async def _open_ports(face: Face, admin: AdminServicer) -> AsyncGenerator[grpc.aio.Server]:
    config = face.config
    names = [face.service, ADMIN_SERVICE]
    server = create_server(max_receive_bytes=face.max_receive_bytes)
    face.register(server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(face.health, names), server)
    reflection.enable_server_reflection([*names, "grpc.health.v1.Health", reflection.SERVICE_NAME], server)
    port = bind_grpc(server, config.host, config.grpc_port)
    face.identity.grpc_address = f"{config.reachable_host}:{port}"
    async with http_health(face.health, face.hooks.metrics, host=config.host, port=config.http_port) as http_port:
        face.identity.http_address = f"{config.reachable_host}:{http_port}"
        await server.start()
        _log.info("service.listening", grpc=face.identity.grpc_address, http=face.identity.http_address)
        changes = asyncio.create_task(_log_health(face), name="health-log")
        try:
            yield server
        finally:
            changes.cancel()
            await server.stop(0)


async def _log_health(face: Face) -> None:
    seen = face.health.snapshot()
    while True:
        now = face.health.snapshot()
        if (now.state, now.serving) != (seen.state, seen.serving) and not (now.serving and seen.serving):
            _log.info("health.changed", state=now.state.value, serving=now.serving, reason=now.reason)
            face.hooks.ledger.record("health.changed", cause=now.reason, state=now.state.value, serving=now.serving)
        seen = now
        await asyncio.sleep(_HEALTH_LOG_S)


@contextlib.contextmanager
def _signals(stop: Stop) -> Generator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.request)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _find_refusal(error: BaseException) -> CannotStart | None:
    if isinstance(error, CannotStart):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for inner in error.exceptions if (found := _find_refusal(inner))), None)
    return None
