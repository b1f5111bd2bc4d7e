"""A course of action written from top to bottom, and run without an event loop.

A core that waits many times in a row, for answers, turns or a moment, is easiest to read as a coroutine. A routine runs
one: it goes on when it is woken or its time has come, and stops at the next `pause`. Nothing else suspends it. Its
driver learns from `turn` when to call again; a test or a simulator calls it with a time of its own.
"""

import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

FOREVER = float("inf")


class Interrupted(BaseException):
    """Raised where a routine waits, when it is to end early: everything it holds is let go on the way out.

    No Exception, so that no handler of an expected failure takes it for one.
    """

    def __init__(self, cause: Exception):
        super().__init__(cause)
        self.cause = cause


@types.coroutine
def _suspend(until: float) -> Generator[float, None, None]:
    yield until


class Routine:
    """Owned by one driver. `wake` and `interrupt` may also be called from within its own run.

    `on_ready` asks the driver for a turn soon; it is called at most once between two turns.
    """

    def __init__(self, on_ready: Callable[[], None]):
        self._on_ready = on_ready
        self._work: Coroutine[float, None, None] | None = None
        self._until = -FOREVER  # what the coroutine waits for: this moment, or being woken
        self._is_woken = False
        self._is_running = False
        self._is_asked = False  # for a turn
        self._cause: Exception | None = None
        self._cause_at = FOREVER
        self.now = 0.0  # the time of the present turn

    @property
    def is_over(self) -> bool:
        return self._work is None

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """The first turn starts it."""
        assert self._work is None, "a routine runs one coroutine"
        self._work = work
        self.wake()

    def wake(self) -> None:
        """Something has come that the coroutine may wait for; it looks for itself."""
        self._is_woken = True
        self._ask()

    def interrupt(self, cause: Exception, at: float = -FOREVER) -> None:
        """Ends the coroutine with Interrupted(cause) where it waits, at `at` or soon; of several the first counts."""
        if at < self._cause_at:
            self._cause = cause
            self._cause_at = at
            self._ask()

    async def pause(self, until: float = FOREVER) -> None:
        """Returns once woken, or at `until`; for the routine's own coroutine."""
        await _suspend(until)

    async def wait_for(self, condition: Callable[[], object], until: float = FOREVER) -> bool:
        """Returns True as soon as `condition` holds, False when it does not at `until`. Whoever makes it true wakes."""
        while not condition():
            if self.now >= until:
                return False
            await self.pause(until)
        return True

    def turn(self, now: float) -> float | None:
        """Goes on if there is a reason to. Returns when to be called again at the latest, None: not before a wake.

        Raises what the coroutine raised; the routine is then over.
        """
        self.now = now
        self._is_asked = False
        while self._work is not None and (self._is_woken or min(self._until, self._cause_at) <= now):
            self._is_woken = False
            self._run(self._work)
        if self._work is None:
            return None
        at = min(self._until, self._cause_at)
        return None if at == FOREVER else at

    def close(self) -> None:
        """Lets go of everything at once, without a reason that anybody hears."""
        if self._work is not None:
            work, self._work = self._work, None
            work.close()

    def _ask(self) -> None:
        if not self._is_asked and not self._is_running:
            self._is_asked = True
            self._on_ready()

    def _run(self, work: Coroutine[float, None, None]) -> None:
        self._is_running = True
        try:
            if self._cause is not None and self._cause_at <= self.now:
                cause, self._cause, self._cause_at = self._cause, None, FOREVER
                self._until = work.throw(Interrupted(cause))
            else:
                self._until = work.send(None)
        except StopIteration:
            self._work = None
        except BaseException:
            self._work = None
            raise
        finally:
            self._is_running = False


ValueT = TypeVar("ValueT")


class Answer(Generic[ValueT]):
    """A value that somebody puts in later, for a routine that waits for it. The first one counts."""

    def __init__(self, wake: Callable[[], None]):
        self._wake = wake
        self._values: list[ValueT] = []

    @property
    def has_come(self) -> bool:
        return bool(self._values)

    @property
    def value(self) -> ValueT:
        """Only once it has come."""
        return self._values[0]

    def put(self, value: ValueT) -> None:
        if not self._values:
            self._values.append(value)
            self._wake()
