"""What a worker's cores note things with: ledger, failpoints and progress, all of them safe in any thread."""

from dataclasses import dataclass

from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.process.health import ProgressWatch


@dataclass(frozen=True, slots=True)
class Instruments:
    """Made once, by the worker's wiring. None of the members tells a core the time."""

    ledger: Ledger
    failpoints: Failpoints
    progress: ProgressWatch  # of the step loop
