"""A Clock that moves only when a test says so."""


class ManualClock:
    """Satisfies isthmus.clock.Clock; only one thread moves it."""

    def __init__(self, now: float = 1000.0):
        self._now = now

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "monotonic time does not go back"
        self._now += seconds
