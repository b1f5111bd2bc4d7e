"""Ledgers as JSON lines beside the processes' logs, also of those about to be killed; what they say of recomputing."""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc.aio

from isthmus.testing.stack import Stack, ledger

_RECOMPUTING = ("prefill.tile", "stream.replayed")  # each with its `ms`, noted at its end


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


def recomputed(logs: Path) -> dict[str, list[tuple[float, float]]]:
    """By request: when a piece of prompt or replay ended, monotonic seconds, and how many seconds it took."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for path in logs.glob("*.ledger"):
        for line in path.read_text().splitlines():
            if any(name in line for name in _RECOMPUTING) and (event := json.loads(line))["event"] in _RECOMPUTING:
                found[event["request"]].append((event["at"], float(event["ms"]) / 1000))
    return dict(found)
