"""A client at its call: what is written to it, and what happens to the request when it leaves."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from isthmus.errors import IsthmusError, RequestCancelled
from isthmus.v1 import inference_pb2
from router.call import Call
from router.interrupt import Interruptible

_END_S = 5.0  # for a request whose client left to let go of what it holds
Context = grpc.aio.ServicerContext[Any, Any]
Wrap = Callable[[inference_pb2.GenerateResponse], Any]


class Attendance:
    """The request runs in a task of its own, so that one that is kept (on_disconnect: retain) outlives its client."""

    def __init__(self, context: Context, received_at: float, timeout_s: float, wrap: Wrap = lambda response: response):
        self._context = context
        self._wrap = wrap
        self._task: asyncio.Future[None] | None = None
        self._is_writing = False
        self._is_known = False  # the client has been told the request's id: it can come back for it
        self._has_left = False
        self.received_at = received_at
        self.timeout_s = timeout_s
        self.life = Interruptible(timeout_s)
        self.call: Call | None = None  # once it is valid

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        if self._has_left:
            return
        self._is_writing = True
        try:
            await self._context.write(self._wrap(response))
        except (asyncio.CancelledError, grpc.aio.InternalError) as error:
            task = asyncio.current_task()
            if self._retention_s == 0 or (task is not None and task.cancelling()):
                raise asyncio.CancelledError from error
            self._leave()  # gRPC says so when the client is gone, to whoever writes
        self._is_writing, self._is_known = False, True

    @property
    def can_say_more(self) -> bool:
        """Not when a message was still on its way: no other may follow it."""
        return not self._is_writing and self.call is not None

    def hand_on(self, why: IsthmusError) -> None:
        """Ends the call and leaves the stream with its decode worker."""
        if self.call is not None and self.call.stream is not None:
            self.call.stream.let_go()
        self.life.interrupt(why)

    async def through(self, work: Awaitable[None]) -> None:
        """Runs `work` to its end. When the client leaves first it is cancelled, or lasts for its retention."""
        task = self._task = asyncio.ensure_future(work)  # kept: it may outlive this call
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.done() and self._retention_s:
                self._leave()
                task.add_done_callback(_retrieve)
            else:
                task.cancel()
                await asyncio.wait({task}, timeout=_END_S)
            raise

    @property
    def _retention_s(self) -> int:
        return self.call.retention_s if self.call is not None and self._is_known else 0

    def _leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            if self.call is not None:
                self.call.is_attended = False
            unread = RequestCancelled("nobody resumed the request within its retention")
            self.life.interrupt(unread, after_s=self._retention_s)


def _retrieve(task: "asyncio.Future[None]") -> None:
    """Nobody waits for it any more: what it raised is in the ledger."""
    if not task.cancelled():
        task.exception()
