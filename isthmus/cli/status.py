"""`isthmus status`: pools, health, load, blocks, streams, restarts and process ids of a running stack."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isthmus.cli import redis_server
from isthmus.cli.grpc_probe import GrpcProbe
from isthmus.cli.state_directory import newest_stack
from isthmus.cli.table import table
from isthmus.client.generation import fields_of
from isthmus.errors import WorkersUnavailable
from isthmus.v1 import admin_pb2

_POOLS = ("routers", "prefill", "decode", "redis")
_HEADER = (
    "service",
    "pid",
    "state",
    "serving",
    "streams",
    "queued",
    "blocks free/cached/total",
    "restarts",
    "address",
    "",
)


@dataclass(slots=True)
class _Known:
    """One process as its supervisor or a router knows it, before it was asked itself."""

    pool: str
    name: str
    pid: int | None
    addresses: dict[str, str] = field(default_factory=dict[str, str])
    restarts: int | None = None  # None: no supervisor told


async def run(parsed: argparse.Namespace) -> int:
    stack = None if parsed.router else newest_stack()
    if stack is None and parsed.router is None:
        raise WorkersUnavailable("no local stack is running; start one with `isthmus up`, or give --router")
    known = await _known_by_router(parsed.router) if stack is None else _known_by_supervisor(stack)
    entries = await asyncio.gather(*(_ask(one) for one in known))
    shown: dict[str, Any] = {key: stack[key] for key in ("ready", "supervisor", "model", "logs")} if stack else {}
    shown |= {pool: [entry for one, entry in zip(known, entries, strict=True) if one.pool == pool] for pool in _POOLS}
    sys.stdout.write(json.dumps(shown) + "\n" if parsed.json else _text(shown))
    return 0


def _known_by_supervisor(stack: dict[str, Any]) -> list[_Known]:
    restarts = stack.get("restarts", {})
    found: list[_Known] = []
    for pool in _POOLS:
        for entry in stack[pool]:
            addresses = {key: entry[key] for key in ("grpc", "address", "zmq", "http") if key in entry}
            found.append(_Known(pool, entry["name"], entry["pid"], addresses, restarts.get(entry["name"])))
    return found


async def _known_by_router(address: str) -> list[_Known]:
    async with GrpcProbe(address) as probe:
        status = await probe.status()
    if status is None:
        raise WorkersUnavailable(f"no router answers at {address}")
    found = [_Known("routers", status.name, status.pid, {"grpc": address})]
    found += [_Known(one.role, one.name, one.pid, {"grpc": one.grpc_address}) for one in status.workers]
    return found


async def _ask(known: _Known) -> dict[str, Any]:
    """The entry of one process; one that does not answer within a second is shown as such."""
    entry: dict[str, Any] = {"name": known.name, "pid": known.pid, **known.addresses, "restarts": known.restarts}
    if "address" in known.addresses:
        serving = await redis_server.RedisProbe(known.addresses["address"]).is_serving()
        return entry | {"reachable": serving, "state": "idle" if serving else "unreachable", "serving": serving}
    async with GrpcProbe(known.addresses["grpc"]) as probe:
        status = await probe.status()
    if status is None:
        return entry | {"reachable": False, "state": "unreachable", "serving": False, "reason": "no answer within 1 s"}
    return entry | {"reachable": True} | _told(status)


def _told(status: admin_pb2.GetStatusResponse) -> dict[str, Any]:
    names = (
        "pid incarnation state serving reason model device dtype numerics_digest num_streams num_queued uptime_s "
        "num_steps num_tasks num_threads num_fds"
    ).split()
    told = {name: getattr(status, name) for name in names}
    told["blocks"] = fields_of(status.blocks) if status.HasField("blocks") else None
    told["layout_fingerprint"] = status.layout.fingerprint
    told["counters"] = dict(status.counters)
    addresses = {"grpc": status.grpc_address, "zmq": status.zmq_endpoint, "http": status.http_address}
    told |= {key: value for key, value in addresses.items() if value}
    if status.role == "router":
        told["workers"] = [
            {"name": one.name, "role": one.role, "serving": one.serving, "state": one.state} for one in status.workers
        ]
    return told


def _text(shown: dict[str, Any]) -> str:
    rows = [_row(entry) for pool in _POOLS for entry in shown[pool]]
    about = (
        f"supervisor {shown['supervisor']}, model {shown['model']}, logs in {shown['logs']}\n\n"
        if "supervisor" in shown
        else ""
    )
    return about + table(_HEADER, rows, right=(1, 4, 5, 6, 7))


def _row(entry: dict[str, Any]) -> Sequence[str]:
    blocks = entry.get("blocks")
    return (
        entry["name"],
        _or_dash(entry["pid"]),
        entry["state"],
        "yes" if entry["serving"] else "no",
        _or_dash(entry.get("num_streams")),
        _or_dash(entry.get("num_queued")),
        f"{blocks['free']}/{blocks['cached']}/{blocks['total']}" if blocks else "-",
        _or_dash(entry["restarts"]),
        entry.get("grpc") or entry.get("address", "-"),
        entry.get("reason", ""),
    )


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)
