"""Brings what other threads have to say into the event loop."""

import asyncio
import contextlib
from collections.abc import Callable

from isthmus.clock import Clock


class EventLoopPost:
    """Made in the event loop; any thread may call it. Calls are run in the order in which they were posted.

    A call that fails goes to `on_failure`, which ends the process: its streams go on elsewhere, which is better than
    streams here that nobody looks after. After the loop's end nothing is run.
    """

    def __init__(self, clock: Clock, on_failure: Callable[[BaseException], None]):
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._on_failure = on_failure

    def __call__(self, function: Callable[[float], object]) -> None:
        """`function` is called soon, with the time."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._run, function)

    def _run(self, function: Callable[[float], object]) -> None:
        try:
            function(self._clock.now())
        except Exception as error:  # noqa: BLE001 - the root of what other threads have done
            self._on_failure(error)
