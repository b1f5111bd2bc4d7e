"""Named places where a test makes a process sleep, raise or die, or harms its frames; set once at start, free when off.

Spec: entries `name=action` joined by `;`, several for one name if wished. The action is kill, raise or sleep(SECONDS);
for the frames of WIRE_NAMES also drop, duplicate, reorder (held back until the next frame has passed) or corrupt (a
byte of the body flips). An entry acts on every hit of its name, on the n-th only (`@n`) or on each n-th (`@every(n)`):
`decode.step=sleep(6)@20;transfer.fill=drop@3;transfer.fill=corrupt@every(5)`.
"""

import os
import re
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

WIRE_NAMES = ("transfer.fill", "transfer.commit", "transfer.abort", "transfer.ack")
WIRE_ACTIONS = ("drop", "duplicate", "reorder", "corrupt")
_ENTRY = re.compile(
    r"(?P<name>[a-z][a-z0-9_.]*)="
    rf"(sleep\((?P<seconds>\d+(\.\d+)?)\)|(?P<action>kill|raise|{'|'.join(WIRE_ACTIONS)}))"
    r"(@(?P<nth>[1-9]\d*)|@every\((?P<every>[1-9]\d*)\))?"
)
_MAX_SLEEP_S = 600.0


class FailpointError(RuntimeError):
    """Raised by a `raise` failpoint: an unexpected error, on purpose."""


@dataclass(frozen=True, slots=True)
class Failpoint:
    name: str
    action: str  # kill, raise, sleep or one of WIRE_ACTIONS
    seconds: float = 0.0
    nth: int | None = None  # acts on this hit only
    every: int = 1  # acts on each hit that is a multiple

    def is_due(self, hit: int) -> bool:
        return hit % self.every == 0 if self.nth is None else hit == self.nth


class Failpoints:
    """Owns the hit counters. Any thread may hit. Without entries: inert."""

    def __init__(self, failpoints: Iterable[Failpoint] = ()):
        self._by_name: defaultdict[str, list[Failpoint]] = defaultdict(list)
        for failpoint in failpoints:
            self._by_name[failpoint.name].append(failpoint)
        self._hits = dict.fromkeys(self._by_name, 0)
        self._lock = threading.Lock()

    @classmethod
    def parse(cls, spec: str) -> "Failpoints":
        """Raises ValueError naming the entry that is not understood."""
        return cls([_parse_entry(entry.strip()) for entry in spec.split(";") if entry.strip()])

    @property
    def harm_the_wire(self) -> bool:
        return any(name in self._hits for name in WIRE_NAMES)

    def hit(self, name: str) -> str | None:
        """Acts if `name` is set and it is its turn; one of WIRE_ACTIONS is for the caller to do. `sleep` blocks."""
        if name not in self._hits:
            return None
        with self._lock:
            self._hits[name] += 1
            due = next((point for point in self._by_name[name] if point.is_due(self._hits[name])), None)
        if due is None or due.action in WIRE_ACTIONS:
            return due and due.action
        if due.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if due.action == "raise":
            raise FailpointError(f"failpoint {name}")
        time.sleep(due.seconds)
        return None


def _parse_entry(entry: str) -> Failpoint:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError(f"failpoint {entry!r} is not name=sleep(SECONDS)|ACTION[@n|@every(n)]")
    name = match["name"]
    action = match["action"] or "sleep"
    seconds = float(match["seconds"] or 0)
    if action in WIRE_ACTIONS and name not in WIRE_NAMES:
        raise ValueError(f"failpoint {entry!r}: {action} is for {', '.join(WIRE_NAMES)}")
    if seconds > _MAX_SLEEP_S:
        raise ValueError(f"failpoint {entry!r}: at most {_MAX_SLEEP_S:g} seconds")
    return Failpoint(name, action, seconds, int(match["nth"]) if match["nth"] else None, int(match["every"] or 1))
