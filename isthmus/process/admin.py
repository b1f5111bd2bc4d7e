"""AdminService on every process: status, drain, ledger. The service's own part of the status comes from a function."""

import asyncio
import dataclasses
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc.aio

from isthmus.clock import Clock
from isthmus.ledger import Ledger, LedgerEvent
from isthmus.metrics import Metrics
from isthmus.process.health import HealthState
from isthmus.v1 import admin_pb2, admin_pb2_grpc

ADMIN_SERVICE = "isthmus.v1.AdminService"
_MAX_DRAIN_S = 600.0
STORED_EVENT = "handoff.stored"
NOT_STORED = "NOT_STORED"  # its cause where the store holds no record of the transfer
_DEFAULT_LEDGER_EVENTS = 1000
_MAX_STORED_HANDOFFS = 32  # looked up for one answer


@dataclasses.dataclass(slots=True)
class Identity:
    """Who the process is; the addresses are known once its ports are bound."""

    name: str
    role: str
    incarnation: str
    grpc_address: str = ""
    zmq_endpoint: str = ""
    http_address: str = ""


# From a request's id and its transfers' ids to what the store holds of each at this moment: one STORED_EVENT each, of
# sequence 0 since no ledger has it. The call is bounded in time, and raises nothing when the store is away.
ReadStoredHandoffs = Callable[[str, Sequence[str]], Awaitable[list[LedgerEvent]]]


@dataclasses.dataclass(frozen=True, slots=True)
class ServiceHooks:
    """What only the service knows. `status` fills that (blocks, streams, layout, workers) and works from the start."""

    status: Callable[[], admin_pb2.GetStatusResponse]
    drain: Callable[[float], Awaitable[int]]  # seconds it may take -> what is left, 0 when all ended
    ledger: Ledger
    metrics: Metrics
    stored_handoffs: ReadStoredHandoffs | None = None  # None: the service does not look into the store


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """The service fills what only it knows; identity, health, counters and process figures are filled in here."""

    def __init__(self, identity: Identity, health: HealthState, hooks: ServiceHooks, clock: Clock):
        self.identity = identity
        self._health = health
        self._hooks = hooks
        self._clock = clock
        self._started_at = self._clock.now()

    async def GetStatus(  # noqa: N802 - named by the protocol
        self, request: admin_pb2.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.GetStatusResponse:
        return self.current_status()

    async def Drain(  # noqa: N802 - named by the protocol
        self, request: admin_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.DrainResponse:
        num_left = await self.drain(min(request.timeout_ms / 1000, _MAX_DRAIN_S))
        return admin_pb2.DrainResponse(drained=num_left == 0, num_left=num_left)

    async def Ledger(  # noqa: N802 - named by the protocol
        self, request: admin_pb2.LedgerRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> admin_pb2.LedgerResponse:
        limit = request.limit or _DEFAULT_LEDGER_EVENTS
        events = self._hooks.ledger.read(request_id=request.request_id, limit=limit)
        events += await self._read_stored(request.request_id, events)
        messages = [admin_pb2.LedgerEvent(**dataclasses.asdict(event)) for event in events]
        return admin_pb2.LedgerResponse(
            incarnation=self.identity.incarnation,
            events=messages,
            monotonic_ns=self._clock.now_ns(),
            name=self.identity.name,
            role=self.identity.role,
        )

    async def _read_stored(self, request_id: str, events: Sequence[LedgerEvent]) -> list[LedgerEvent]:
        """What the store holds of the newest transfers of the request that was asked for."""
        if self._hooks.stored_handoffs is None or not request_id:
            return []
        transfer_ids = {event.transfer_id: None for event in events if event.request_id == request_id}
        transfer_ids.pop("", None)
        newest = list(transfer_ids)[-_MAX_STORED_HANDOFFS:]
        return await self._hooks.stored_handoffs(request_id, newest) if newest else []

    async def drain(self, timeout_s: float) -> int:
        """Stops admission at once, then waits at most `timeout_s`; what is left at the end."""
        self._health.drain()
        return await self._hooks.drain(timeout_s)

    def current_status(self) -> admin_pb2.GetStatusResponse:
        status = self._hooks.status()
        health = self._health.snapshot()
        for name, value in dataclasses.asdict(self.identity).items():
            setattr(status, name, value)
        status.pid = os.getpid()
        status.state = health.state.value
        status.serving = health.serving
        status.reason = health.reason
        status.num_steps = self._health.watch.num_steps
        status.uptime_s = self._clock.now() - self._started_at
        status.counters.update(self._hooks.metrics.counters())
        status.num_tasks = len(asyncio.all_tasks())
        status.num_threads = threading.active_count()
        status.num_fds = len(os.listdir("/proc/self/fd")) - 1  # the listing holds one itself
        return status
