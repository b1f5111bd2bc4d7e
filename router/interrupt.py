"""A request's deadline, and the way to end it early from outside its task: Cancel, or a client that does not read."""

import asyncio
from types import TracebackType

from isthmus.errors import DeadlinePassed, IsthmusError


class Interruptible:
    """`async with` around a request's life; leaves with DeadlinePassed after `timeout_s`, or with the given cause.

    The task is cancelled where it waits, so everything it holds is released on the way out. The task's own
    cancellation (the client is gone) passes through unchanged.
    """

    def __init__(self, timeout_s: float):
        self._timeout = asyncio.timeout(max(timeout_s, 0.0))
        self._cause: IsthmusError | None = None

    def interrupt(self, cause: IsthmusError, *, after_s: float = 0.0) -> None:
        """Ends the life from any other task of the loop, in `after_s` unless it ends earlier."""
        at, end = asyncio.get_running_loop().time() + after_s, self._timeout.when()
        if not self._timeout.expired() and end is not None and at < end:
            self._cause = cause
            self._timeout.reschedule(at)

    async def __aenter__(self) -> "Interruptible":
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError as passed:
            raise self._cause or DeadlinePassed("the request's deadline has passed") from passed
