"""A service without work, for tests of what surrounds services: `python stand_in.py MODE [flags of a service]`."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncGenerator

from isthmus.clock import SystemClock
from isthmus.config import DecodeConfig
from isthmus.errors import CannotStart
from isthmus.ids import SystemIds
from isthmus.ledger import Ledger
from isthmus.metrics import Metrics
from isthmus.process.admin import Identity, ServiceHooks
from isthmus.process.health import HealthState, ProgressWatch
from isthmus.process.serving import Face, Stop, run_service, serve_until_signal
from isthmus.v1 import admin_pb2


async def drained(timeout_s: float) -> int:
    return 0


async def main(config: DecodeConfig) -> None:
    if mode == "refuse":
        raise CannotStart("model", "config.json is missing", "give a checkpoint with --model")
    clock = SystemClock()
    health = HealthState(ProgressWatch(clock))

    @contextlib.asynccontextmanager
    async def work(stop: Stop) -> AsyncGenerator[None]:
        if mode == "never":
            health.not_ready("layout: block_size 16 != 32")
        else:
            health.ready()
        if mode == "stubborn":
            asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        yield

    def status() -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(blocks=admin_pb2.BlockCounts(total=10, free=9, cached=2, referenced=1))

    role = config.name.partition("-")[0]
    hooks = ServiceHooks(status, drained, Ledger(clock), Metrics())
    identity = Identity(config.name, role, SystemIds().incarnation())
    await serve_until_signal(
        Face(config, identity, health, hooks, clock, "isthmus.v1.DecodeService", lambda _server: None), work
    )


if __name__ == "__main__":
    mode = sys.argv.pop(1)
    run_service(DecodeConfig, main)
