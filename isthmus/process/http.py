"""/livez, /readyz and /metrics over HTTP, in the service's own event loop."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Generator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from isthmus.metrics import Metrics
from isthmus.process.health import HealthState
from isthmus.process.rpc import bound_socket

_MAX_CONNECTIONS = 64
_EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@contextlib.asynccontextmanager
async def http_health(health: HealthState, metrics: Metrics, *, host: str, port: int) -> AsyncGenerator[int]:
    """Serves until the block ends; yields the port bound. Raises CannotStart when it is taken."""
    bound = bound_socket(host, port, "http_port")
    server = _QuietServer(
        uvicorn.Config(
            health_app(health, metrics),
            log_config=None,
            access_log=False,
            lifespan="off",
            http="h11",
            ws="none",
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
    )
    bound.listen(_MAX_CONNECTIONS)
    task = asyncio.create_task(server.serve(sockets=[bound]), name="http-health")
    try:
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        bound.close()


def health_app(health: HealthState, metrics: Metrics) -> Starlette:
    async def livez(request: Request) -> Response:
        """The loop answers: alive, whatever its state."""
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        now = health.snapshot()
        body = {"state": now.state.value, "serving": now.serving, "reason": now.reason}
        return JSONResponse(body, status_code=200 if now.serving else 503)

    async def exposition(request: Request) -> Response:
        return Response(metrics.exposition(), media_type=_EXPOSITION_TYPE)

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", exposition)])


class _QuietServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals belong to the process's own drain, not to its HTTP face."""
        yield
