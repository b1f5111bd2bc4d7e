"""A clock that stands still until a test moves it."""


class ManualClock:
    """Starts at a moment far from zero, so that a forgotten default shows."""

    def __init__(self, now: float = 1000.0):
        self._now = now

    def now(self) -> float:
        return self._now

    def now_ns(self) -> int:
        return round(self._now * 1e9)

    def advance(self, seconds: float) -> None:
        assert seconds >= 0, "monotonic time does not go back"
        self._now += seconds
