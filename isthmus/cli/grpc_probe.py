"""Looks at one service from outside: health and status, each within a short timeout."""

from types import TracebackType
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from isthmus.process.rpc import channel
from isthmus.v1 import admin_pb2, admin_pb2_grpc

_TIMEOUT_S = 1.0


class GrpcProbe:
    """An async context manager: one channel, open for its block."""

    def __init__(self, address: str):
        self._address = address

    async def __aenter__(self) -> "GrpcProbe":
        self._channel = channel(self._address)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def is_serving(self) -> bool:
        """False also when it does not answer in time."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer: health_pb2.HealthCheckResponse = await stub.Check(
                health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S
            )
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    async def status(self) -> admin_pb2.GetStatusResponse | None:
        """None when it does not answer in time."""
        stub = admin_pb2_grpc.AdminServiceStub(self._channel)
        try:
            return await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None

    async def reason(self) -> str:
        """Why it does not serve, in its own words."""
        status = await self.status()
        return "it does not answer" if status is None else f"{status.state}: {status.reason}"
