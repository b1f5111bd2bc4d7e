"""Ledgers as JSON lines beside the processes' logs, also of those about to be killed; what they say of recomputing."""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from isthmus.testing.stack import Stack, ledger

_RECOMPUTING = ("prefill.tile", "stream.replayed")  # each with its `ms`, noted at its end
_RECOVERING = ("attempt.failed", "request.rearmed", "request.moved", "request.resumed")
_BEGUN = "request.accepted"


@dataclass(frozen=True, slots=True)
class Told:
    """What ledgers say of one request, in monotonic seconds."""

    recomputed: list[tuple[float, float]] = field(
        default_factory=list[tuple[float, float]]
    )  # (when it ended, how long)
    recoveries: list[float] = field(default_factory=list[float])  # when another process took over
    begun: list[float] = field(default_factory=list[float])  # when a router accepted it under this id


async def save_ledger(stack: Stack, process: Mapping[str, Any], suffix: str = "") -> None:
    """Nothing of a process without one; of one that does not answer, why."""
    if "grpc" in process:
        (stack.logs / f"{process['name']}{suffix}.ledger").write_text(await _lines(process["grpc"]))


async def save_ledgers(stack: Stack) -> None:
    for process in stack.current():
        await save_ledger(stack, process)


async def _lines(address: str) -> str:
    try:
        events = await ledger(address)
    except grpc.aio.AioRpcError as error:
        return json.dumps({"at": 0, "event": f"no answer: {error.code().name}"})
    return "\n".join(
        json.dumps(
            {
                "at": event.monotonic_ns / 1e9,
                "event": event.event,
                "request": event.request_id,
                "transfer": event.transfer_id,
                "attempt": event.attempt,
                "cause": event.cause,
                **event.fields,
            }
        )
        for event in events
    )


def read_ledgers(logs: Path) -> dict[str, Told]:
    """By request, from all ledgers that were saved."""
    found: dict[str, Told] = defaultdict(Told)
    for path in logs.glob("*.ledger"):
        for event in map(json.loads, path.read_text().splitlines()):
            if event["event"] in _RECOMPUTING:
                found[event["request"]].recomputed.append((event["at"], float(event["ms"]) / 1000))
            elif event["event"] in _RECOVERING:
                found[event["request"]].recoveries.append(event["at"])
            elif event["event"] == _BEGUN:
                found[event["request"]].begun.append(event["at"])
    return dict(found)
