"""What the parts of one worker process share."""

from dataclasses import dataclass

from isthmus.clock import LoopClock
from isthmus.config import WorkerConfig
from isthmus.failpoints import Failpoints
from isthmus.ids import Ids
from isthmus.ledger import Ledger
from isthmus.metrics import Metrics
from isthmus.process.admin import Identity
from isthmus.process.health import HealthState, ProgressWatch


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Made once, in the composition root; every member may be used by any thread."""

    identity: Identity
    clock: LoopClock
    ledger: Ledger
    metrics: Metrics
    health: HealthState
    failpoints: Failpoints

    @classmethod
    def create(cls, config: WorkerConfig, clock: LoopClock, ids: Ids) -> "WorkerContext":
        return cls(
            identity=Identity(config.name, config.role, ids.incarnation()),
            clock=clock,
            ledger=Ledger(clock),
            metrics=Metrics(),
            health=HealthState(ProgressWatch(clock)),
            failpoints=Failpoints.parse(config.failpoints),
        )

    @property
    def progress(self) -> ProgressWatch:
        return self.health.watch
