"""What a process is doing and whether it serves: its state, and whether its step loop makes progress."""

import threading
from dataclasses import dataclass
from enum import Enum

from isthmus.clock import Clock

STALL_S = 3.0  # work pending and no layer of a step finished for this long


class ServiceState(Enum):
    STARTING = "starting"
    IDLE = "idle"
    STEPPING = "stepping"
    STALLED = "stalled"
    DRAINING = "draining"
    NOT_READY = "not_ready"


@dataclass(frozen=True, slots=True)
class Health:
    """One look at a process."""

    state: ServiceState
    serving: bool
    reason: str = ""  # why not serving


class ProgressWatch:
    """Whether the step loop makes progress, seen from outside it: the loop reports, any thread asks."""

    def __init__(self, clock: Clock, stall_s: float = STALL_S):
        self._clock = clock
        self.stall_s = stall_s
        self._lock = threading.Lock()
        self._progress_at: float | None = None  # None: nothing is pending
        self.num_steps = 0  # finished ones

    def begin_work(self) -> None:
        """Work is pending. Calling it again while work is pending does not count as progress."""
        with self._lock:
            if self._progress_at is None:
                self._progress_at = self._clock.now()

    def layer_done(self) -> None:
        """A layer is progress enough: a step of a large model may take longer than a stall."""
        with self._lock:
            if self._progress_at is not None:
                self._progress_at = self._clock.now()

    def step_done(self) -> None:
        self.num_steps += 1
        self.layer_done()

    def idle(self) -> None:
        """Nothing is pending."""
        with self._lock:
            self._progress_at = None

    @property
    def is_working(self) -> bool:
        return self._progress_at is not None

    @property
    def seconds_since_progress(self) -> float:
        """0 while idle."""
        with self._lock:
            return 0.0 if self._progress_at is None else max(0.0, self._clock.now() - self._progress_at)


class HealthState:
    """Owned by the process's wiring; any thread sets and reads it. Computed at each look: it needs no loop."""

    def __init__(self, watch: ProgressWatch):
        self.watch = watch
        self._lock = threading.Lock()
        self._phase = Health(ServiceState.STARTING, serving=False, reason="starting")

    def starting(self, reason: str) -> None:
        """How far the start is. Without effect after it."""
        with self._lock:
            if self._phase.state is ServiceState.STARTING:
                self._phase = Health(ServiceState.STARTING, serving=False, reason=reason)

    def ready(self) -> None:
        """Serving from now on. Without effect while draining."""
        self._set(Health(ServiceState.IDLE, serving=True))

    def not_ready(self, reason: str) -> None:
        """Not serving, and why. Without effect while draining."""
        self._set(Health(ServiceState.NOT_READY, serving=False, reason=reason))

    def drain(self) -> None:
        """For good: a process that drains does not serve again."""
        self._set(Health(ServiceState.DRAINING, serving=False, reason="draining"))

    def snapshot(self) -> Health:
        phase = self._phase
        if not phase.serving or not self.watch.is_working:
            return phase
        seconds = self.watch.seconds_since_progress
        if seconds >= self.watch.stall_s:
            return Health(ServiceState.STALLED, serving=False, reason=f"no layer finished for {seconds:.1f} s")
        return Health(ServiceState.STEPPING, serving=True)

    def _set(self, phase: Health) -> None:
        with self._lock:
            if self._phase.state is not ServiceState.DRAINING:
                self._phase = phase
