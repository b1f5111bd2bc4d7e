"""When a child that ended is started again. No process and no clock: the time is passed in."""

FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 5.0
LIVED_WELL_S = 10.0


class RestartPolicy:
    """One child's restarts: each waits twice as long as the one before, up to a bound.

    A child that lived well starts over with the first wait. Written by the task that keeps the child alive.
    """

    def __init__(self) -> None:
        self._backoff_s = FIRST_BACKOFF_S
        self._started_at = 0.0

    def started(self, now: float) -> None:
        """The child is about to be started."""
        self._started_at = now

    def ended(self, now: float) -> float:
        """The child ended; returns the seconds to wait before it is started again."""
        if now - self._started_at > LIVED_WELL_S:
            self._backoff_s = FIRST_BACKOFF_S
        backoff_s = self._backoff_s
        self._backoff_s = min(MAX_BACKOFF_S, 2 * backoff_s)
        return backoff_s


class StartPatience:
    """How long a stack's start is waited for, and when a person is shown what it waits for.

    Written by the task that waits.
    """

    SHOWN_AFTER_S = 2.0

    def __init__(self, timeout_s: float, now: float):
        self._deadline = now + timeout_s
        self._shown_from = now + self.SHOWN_AFTER_S

    def is_over(self, now: float) -> bool:
        """The start has failed."""
        return now > self._deadline

    def is_tried(self, now: float) -> bool:
        """The start takes long enough to be explained."""
        return now > self._shown_from
