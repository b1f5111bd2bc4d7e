"""The processes of a running stack: which of them serve, what they hold, and workers beside the supervisor's own."""

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import grpc.aio

from isthmus.cli.child_process import launched
from isthmus.cli.stack_plan import HOST, Ports
from isthmus.config import checkout_root, worker_environment
from isthmus.testing.stack import Stack, status, until
from isthmus.v1 import admin_pb2

SERVES_AGAIN_S = 45.0  # a worker's start, import of torch and canary included, on a machine that is busy
_ASK_S = 1.0
_MODULES = {"prefill": "prefill_service", "decode": "decode_service"}


@dataclass(slots=True)
class Worker:
    """A worker process that joined a running stack; it goes with the block that started it."""

    name: str
    role: str
    grpc: str
    process: "subprocess.Popen[bytes]"

    async def retire(self, timeout_s: float = 30.0) -> int:
        """Ends it with SIGTERM, as when a pool is made smaller; returns the exit status. Raises TimeoutExpired."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, timeout_s)


@contextlib.contextmanager
def added_worker(stack: Stack, role: str, name: str, *more_flags: str, host: str = HOST) -> Iterator[Worker]:
    """`python -m prefill_service|decode_service` with the stack's Redis; its log lies beside the others'."""
    ports = Ports()
    try:
        grpc_port = ports.take()
        flags = ["--name", name, "--host", host, "--grpc-port", str(grpc_port), "--redis-url", stack.redis_url]
        command = launched((sys.executable, "-m", _MODULES[role], *flags, *more_flags))
        with (stack.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=checkout_root(), env=worker_environment()
            )
        with process:
            try:
                yield Worker(name, role, f"{host}:{grpc_port}", process)
            finally:
                process.kill()
    finally:
        ports.close()


async def status_or_none(address: str) -> admin_pb2.GetStatusResponse | None:
    """What a service says of itself; None when it does not answer within a second."""
    try:
        return await status(address, _ASK_S)
    except grpc.aio.AioRpcError:
        return None


async def is_known(stack: Stack, name: str, incarnation: str) -> bool:
    """Whether every router that answers places work on this incarnation."""
    seen = [one for address in stack.routers if (one := await status_or_none(address))]
    known = [{worker.name: worker for worker in one.workers if worker.serving} for one in seen]
    return bool(seen) and all(name in workers and workers[name].incarnation == incarnation for workers in known)


async def serves(stack: Stack, name: str, address: str, role: str) -> bool:
    """Whether a process serves; a worker only once every router knows its present incarnation."""
    seen = await status_or_none(address)
    if seen is None or not seen.serving:
        return False
    return role not in _MODULES or await is_known(stack, name, seen.incarnation)


async def until_known(stack: Stack, worker: Worker) -> None:
    """Waits until an added worker serves. Raises AssertionError when it ended, or takes too long."""

    async def joined() -> bool:
        assert worker.process.poll() is None, f"{worker.name} ended with {worker.process.returncode}"
        return await serves(stack, worker.name, worker.grpc, worker.role)

    await until(joined, SERVES_AGAIN_S, f"{worker.name} serves")


async def statuses(stack: Stack, *added: Worker) -> dict[str, admin_pb2.GetStatusResponse]:
    """The status of every service by its name. Raises AioRpcError when one does not answer."""
    addresses = {entry["name"]: entry["grpc"] for entry in stack.current() if "grpc" in entry}
    addresses |= {worker.name: worker.grpc for worker in added}
    answers = await asyncio.gather(*(status(address) for address in addresses.values()))
    return dict(zip(addresses, answers, strict=True))


def left_over(seen: dict[str, admin_pb2.GetStatusResponse]) -> list[str]:
    """Lines for what a quiet stack must not hold: streams, queued requests, blocks that are not free."""
    held = []
    for name, one in seen.items():
        counts = {
            "streams": one.num_streams,
            "queued": one.num_queued,
            "referenced": one.blocks.referenced,
            "draining": one.blocks.draining,
            "not free": one.blocks.total - one.blocks.free,
        }
        held += [f"{name}: {count} {what}" for what, count in counts.items() if count]
    return held
