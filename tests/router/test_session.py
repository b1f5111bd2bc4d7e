"""A session's own life, apart from requests."""

import asyncio
from typing import Any

import pytest

from isthmus.clock import SystemClock
from isthmus.v1 import decode_pb2
from router.session import Session, SessionPeer
from tests.router.fakes import until


class FailingCall:
    """Says hello; then its reader fails with what no session expects, when it is told to."""

    def __init__(self) -> None:
        self.fails = asyncio.Event()
        self._has_greeted = False

    async def write(self, message: decode_pb2.SessionRequest) -> None:
        return

    async def read(self) -> decode_pb2.SessionResponse:
        if not self._has_greeted:
            self._has_greeted = True
            return decode_pb2.SessionResponse(hello=decode_pb2.DecodeHello(incarnation="d"))
        await self.fails.wait()
        raise ValueError("nonsense")


class Stub:
    def __init__(self) -> None:
        self.call = FailingCall()

    def Session(self) -> FailingCall:  # noqa: N802
        return self.call


@pytest.mark.parametrize("num_ticks", range(8))
async def test_a_cancellation_just_as_the_connection_fails_ends_the_session(num_ticks: int) -> None:
    stub: Any = Stub()
    session = Session(stub, SessionPeer("r", "d", "d0"), clock=SystemClock(), on_change=lambda: None)
    running = asyncio.create_task(session.run())
    await until(lambda: session.is_alive, "the session is alive")

    stub.call.fails.set()
    for _ in range(num_ticks):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running}, timeout=1.0)

    assert running.cancelled()
    assert not session.is_alive
