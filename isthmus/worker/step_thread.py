"""The thread that drives step loops: it hands them commands, gives them turns at the times they ask for, and ends them.

It decides nothing and knows nothing of engines. A worker of one role has one loop in its thread; a worker that does
both roles has two, whose turns alternate, so that one device never computes two steps at once.
"""

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Never, Protocol, TypeVar

from isthmus.clock import Clock
from isthmus.log import get_logger

log = get_logger("worker.step_thread")

Command = TypeVar("Command")
Taken = TypeVar("Taken", contravariant=True)
Post = Callable[[Command], None]  # from any thread; wakes the step thread


class StepLoop(Protocol[Taken]):
    """What a step thread drives; called by that thread alone. Times are seconds on the thread's clock."""

    def take(self, command: Taken) -> None:
        """Notes what was posted; commands come in the order of their posting, and before the next turn."""
        ...

    def turn(self, now: float) -> float | None:
        """Does one thing, a step at most, and says when it wants the next turn at the latest.

        `now` (or any moment that has passed): at once, there is more to do. A later moment: then, or as soon as a
        command comes. None: it is idle; the next turn comes with a command or after the thread's idle time.
        """
        ...

    def close(self, now: float) -> None:
        """The thread ends: whatever is still here is ended. Not called after a crash."""
        ...


class StepThread:
    """Owned by the worker's wiring. One thread and the loops that were added before its start.

    An exception from a loop ends the thread: it is logged, and `on_crash` hears of it in this thread. Nothing bounds
    the posted commands here; each loop's submitters bound what they post.
    """

    def __init__(self, name: str, clock: Clock, *, idle_wait_s: float, on_crash: Callable[[BaseException], None]):
        self._clock = clock
        self._idle_wait_s = idle_wait_s
        self._on_crash = on_crash
        self._loops: list[StepLoop[Never]] = []
        self._posted: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: stop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def add(self, loop: StepLoop[Command]) -> Post[Command]:
        """Before `start`. What is posted before the start waits for it."""
        assert self._thread.ident is None, "loops are added before the thread starts"
        self._loops.append(loop)

        def post(command: Command) -> None:
            self._posted.put(partial(loop.take, command))

        return post

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the step it computes and closes its loops; waits for it as long as `timeout_s`."""
        self._posted.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._turn_until_stopped()
            for loop in self._loops:
                loop.close(self._clock.now())
        except Exception as error:
            log.exception("step_thread_failed", error, thread=self._thread.name)
            self._on_crash(error)

    def _turn_until_stopped(self) -> None:
        wait_s = 0.0
        while self._take_commands(wait_s):
            next_at = self._clock.now() + self._idle_wait_s
            for loop in self._loops:
                wanted_at = loop.turn(self._clock.now())
                if wanted_at is not None:
                    next_at = min(next_at, wanted_at)
            wait_s = max(0.0, next_at - self._clock.now())

    def _take_commands(self, wait_s: float) -> bool:
        """Hands over everything posted; waits for the first so long. False: the thread was told to stop."""
        try:
            take = self._posted.get(block=wait_s > 0, timeout=wait_s)
            while take is not None:
                take()
                take = self._posted.get_nowait()
        except queue.Empty:
            return True
        return False
