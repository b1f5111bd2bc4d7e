"""grpc.health.v1 over a process's health."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.process.health import HealthState

_WATCH_INTERVAL_S = 0.1
_MAX_WATCHERS = 256


class HealthServicer(health_pb2_grpc.HealthServicer):
    """grpc.health.v1 for the process as a whole ("") and for each of its services by full name."""

    def __init__(self, state: HealthState, services: Iterable[str]):
        self._state = state
        self._services = {"", *services}
        self._num_watchers = 0

    async def Check(  # noqa: N802 - named by the protocol
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802 - named by the protocol
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        if self._num_watchers >= _MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watchers")
        self._num_watchers += 1
        try:
            sent = None
            while True:
                status = self._status(request.service)
                if status != sent:
                    yield health_pb2.HealthCheckResponse(status=status)
                    sent = status
                await asyncio.sleep(_WATCH_INTERVAL_S)
        finally:
            self._num_watchers -= 1

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._services:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        serving = self._state.snapshot().serving
        return health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
