"""What a failed run leaves for a person: every record, the ledgers of all processes, their logs; and the run's seed."""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from isthmus.testing.stack import Stack
from tests.chaos.faults import Injected
from tests.chaos.history import Oracle, Record, violations
from tests.chaos.ledgers import save_ledgers

SEED = int(os.environ.get("CHAOS_SEED", "0")) or int.from_bytes(os.urandom(4), "little")
KEEP = "CHAOS_KEEP" in os.environ  # also of runs that pass


def logged_errors(logs: Path) -> list[str]:
    """What processes themselves took for a fault of the program: it is never a fault's due effect."""
    lines = (line for path in logs.glob("*.log") for line in path.read_text(errors="replace").splitlines())
    events = [json.loads(line) for line in lines if line.startswith("{") and '"level": "error"' in line]
    return [f"{event['service']} logged {event['event']}: {_last_line(event)}" for event in events]


def _last_line(event: Mapping[str, str]) -> str:
    return event.get("traceback", "").strip().rpartition("\n")[2]


async def keep(
    stack: Stack, records: Sequence[Record], faults: Sequence[Injected], expected: Mapping[str, Oracle]
) -> Path:
    """The directory where all of it lies."""
    path = Path(tempfile.mkdtemp(prefix="isthmus-chaos-"))
    problems = {number: lines for number, record in enumerate(records) if (lines := violations([record], expected))}
    told = [{"problems": problems.get(number, []), **asdict(record)} for number, record in enumerate(records)]
    (path / "problems.txt").write_text("\n".join(line for lines in problems.values() for line in lines))
    (path / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults], indent=1))
    (path / "records.json").write_text("[\n" + ",\n".join(map(json.dumps, told)) + "\n]")
    await save_ledgers(stack)
    await asyncio.to_thread(shutil.copytree, stack.logs, path / "logs")
    return path
