"""Named places where a test makes a process sleep, raise or die; set once at start, free when off.

Spec: `name=action[@n]` joined by `;`, e.g. `decode.step=sleep(6)@20;prefill.layer=raise@1;decode.claim=kill@5`.
`@n` acts on the n-th hit only; without it on every hit.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

_ENTRY = re.compile(
    r"(?P<name>[a-z][a-z0-9_.]*)=(sleep\((?P<seconds>\d+(\.\d+)?)\)|(?P<action>raise|kill))(@(?P<nth>[1-9]\d*))?"
)
_MAX_SLEEP_S = 600.0


class FailpointError(RuntimeError):
    """Raised by a `raise` failpoint: an unexpected error, on purpose."""


@dataclass(frozen=True, slots=True)
class Failpoint:
    action: str  # sleep, raise or kill
    seconds: float
    nth: int | None  # None: every hit


class Failpoints:
    """Owns the hit counters. Any thread may hit."""

    def __init__(self, by_name: Mapping[str, Failpoint]):
        self._by_name = by_name
        self._hits = dict.fromkeys(by_name, 0)
        self._lock = threading.Lock()

    @classmethod
    def parse(cls, spec: str) -> "Failpoints":
        """Raises ValueError naming the entry that is not understood."""
        entries = [entry.strip() for entry in spec.split(";") if entry.strip()]
        return cls(dict(map(_parse_entry, entries)))

    def hit(self, name: str) -> None:
        """Acts if `name` is set and it is its turn. `sleep` blocks the calling thread."""
        failpoint = self._by_name.get(name)
        if failpoint is None:
            return
        with self._lock:
            self._hits[name] += 1
            if failpoint.nth is not None and self._hits[name] != failpoint.nth:
                return
        if failpoint.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if failpoint.action == "raise":
            raise FailpointError(f"failpoint {name}")
        time.sleep(failpoint.seconds)


def _parse_entry(entry: str) -> tuple[str, Failpoint]:
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError(f"failpoint {entry!r} is not name=sleep(seconds)|raise|kill[@n]")
    seconds = float(match["seconds"] or 0)
    if seconds > _MAX_SLEEP_S:
        raise ValueError(f"failpoint {entry!r}: at most {_MAX_SLEEP_S:g} seconds")
    return match["name"], Failpoint(match["action"] or "sleep", seconds, int(match["nth"]) if match["nth"] else None)
