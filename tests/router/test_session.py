"""A session's own life, apart from requests."""

import asyncio
from typing import Any

import pytest

from isthmus.clock import SystemClock
from isthmus.v1 import decode_pb2
from router.pool.drivers import GrpcSessionLink, Tasks
from router.pool.session import Session, SessionPeer
from tests.router.real_ports import until


class FailingCall:
    """Says hello; then its reader fails with what no session expects, when it is told to."""

    def __init__(self) -> None:
        self.fails = asyncio.Event()
        self._has_greeted = False

    async def write(self, message: decode_pb2.SessionRequest) -> None:
        return

    def cancel(self) -> bool:
        return True

    async def read(self) -> decode_pb2.SessionResponse:
        if not self._has_greeted:
            self._has_greeted = True
            return decode_pb2.SessionResponse(hello=decode_pb2.DecodeHello(incarnation="d"))
        await self.fails.wait()
        raise ValueError("nonsense")


class FakeChannel:
    """A channel whose one method is Session."""

    def __init__(self) -> None:
        self.call = FailingCall()
        self.is_closed = False

    def stream_stream(self, method: str, **_: Any) -> Any:
        return lambda: self.call

    def unary_unary(self, method: str, **_: Any) -> Any:
        return None

    async def close(self, grace: float) -> None:
        self.is_closed = True


@pytest.mark.parametrize("num_ticks", range(8))
async def test_a_cancellation_just_as_the_connection_fails_ends_the_session(num_ticks: int) -> None:
    channel: Any = FakeChannel()
    tasks = Tasks()
    session = Session(SessionPeer("r", "d", "d0"), on_change=lambda: None)
    link = GrpcSessionLink(channel, session, SystemClock(), tasks)
    session.link = link
    link.start("d0")
    running = link._running
    assert running is not None
    await until(lambda: session.is_alive, "the session is alive")

    channel.call.fails.set()
    for _ in range(num_ticks):
        await asyncio.sleep(0)
    session.abandon("the session was closed", 0.0)
    link.close()
    await asyncio.wait({running}, timeout=1.0)

    assert running.cancelled()
    assert not session.is_alive
    await tasks.end(1.0)
    assert channel.is_closed
