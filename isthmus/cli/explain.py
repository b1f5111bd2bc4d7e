"""`isthmus explain REQUEST_ID`: what became of one request, merged from the ledgers of all processes.

A decode worker adds what Redis holds of the request's transfers at that moment (`handoff.stored`).
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import grpc.aio

from isthmus.cli.grpc_probe import GrpcProbe
from isthmus.cli.state_directory import newest_stack
from isthmus.cli.timeline import RequestStory, StoryEvent
from isthmus.errors import WorkersUnavailable
from isthmus.process.rpc import channel
from isthmus.v1 import admin_pb2, admin_pb2_grpc

_TIMEOUT_S = 2.0  # for each process
_MAX_EVENTS = 20_000  # as many as a ledger holds
_MAX_TRANSFERS = 32  # looked up by their own id


@dataclass(frozen=True, slots=True)
class _Told:
    """One process's answers, its clock aligned with ours."""

    name: str
    role: str
    address: str
    offset_ns: int
    incarnation: str
    events: dict[tuple[int, str], admin_pb2.LedgerEvent]  # by sequence, and transfer for those that have none


async def run(parsed: argparse.Namespace) -> int:
    addresses = await _addresses(parsed.router)
    told = [one for one in await asyncio.gather(*(_ask(address, parsed.request_id) for address in addresses)) if one]
    unreached = sorted(addresses.keys() - {one.address for one in told})
    not_reached = [f"{addresses[address] or 'router'} at {address}" for address in unreached]
    names = {one.incarnation: one.name for one in told if one.incarnation}
    story = RequestStory(parsed.request_id, list(_merged(told)), not_reached, names)
    if not story.events:
        asked = ", ".join(one.name for one in told) or "nobody"
        missing = f"; not reached: {', '.join(not_reached)}" if not_reached else ""
        sys.stderr.write(f"isthmus explain: no ledger knows request {parsed.request_id} (asked: {asked}{missing})\n")
        return 1
    sys.stdout.write(json.dumps(story.as_dict()) + "\n" if parsed.json else story.as_text())
    return 0


async def _addresses(routers: str | None) -> dict[str, str]:
    """Every process, by address, with its name where it is known. Raises WorkersUnavailable."""
    stack = None if routers else newest_stack()
    if stack is None and not routers:
        raise WorkersUnavailable("no local stack is running; start one with `isthmus up`, or give --router")
    known: dict[str, str] = {}
    if stack is not None:
        known |= {entry["grpc"]: entry["name"] for role in ("routers", "prefill", "decode") for entry in stack[role]}
        asked = [entry["grpc"] for entry in stack["routers"]]
    else:
        asked = [address.strip() for address in (routers or "").split(",") if address.strip()]
    answers = [status for status in await asyncio.gather(*(_status(address) for address in asked)) if status]
    if stack is None and not answers:
        raise WorkersUnavailable(f"no router answers at {', '.join(asked)}")
    workers = {worker.grpc_address: worker.name for status in answers for worker in status.workers}
    return {address: "" for address in asked} | workers | known


async def _status(address: str) -> admin_pb2.GetStatusResponse | None:
    async with GrpcProbe(address) as probe:
        return await probe.status()


async def _ask(address: str, request_id: str) -> _Told | None:
    """None when it does not answer in time. What a transfer did without knowing its request is asked for by its id."""
    try:
        async with asyncio.timeout(_TIMEOUT_S), channel(address) as opened:
            stub = admin_pb2_grpc.AdminServiceStub(opened)
            began_ns = time.monotonic_ns()
            answer = await stub.Ledger(admin_pb2.LedgerRequest(request_id=request_id, limit=_MAX_EVENTS))
            ended_ns = time.monotonic_ns()
            events = {(event.sequence, event.transfer_id): event for event in answer.events}
            transfers = {event.transfer_id for event in answer.events} - {""}
            for transfer_id in sorted(transfers)[:_MAX_TRANSFERS]:
                more = await stub.Ledger(admin_pb2.LedgerRequest(request_id=transfer_id, limit=_MAX_EVENTS))
                for event in more.events:
                    if event.request_id in ("", request_id):
                        events[event.sequence, event.transfer_id] = event
    except (grpc.aio.AioRpcError, TimeoutError):
        return None
    offset_ns = _offset_ns(answer.monotonic_ns, began_ns, ended_ns)
    return _Told(answer.name, answer.role, address, offset_ns, answer.incarnation, events)


def _offset_ns(theirs: int, began: int, ended: int) -> int:
    """What their clock lacks, as good as half the round trip; a difference below that is none: the same machine."""
    offset = (began + ended) // 2 - theirs
    return 0 if abs(offset) <= (ended - began) // 2 else offset


def _merged(told: Collection[_Told]) -> Iterable[StoryEvent]:
    """By time; a process's own order is kept."""
    found = [(event.monotonic_ns + one.offset_ns, one, event) for one in told for event in one.events.values()]
    found.sort(key=lambda entry: (entry[0], entry[1].name, entry[2].sequence))
    for at_ns, one, event in found:
        yield StoryEvent(
            ms=(at_ns - found[0][0]) / 1e6,
            process=one.name,
            event=event.event,
            attempt=event.attempt,
            transfer_id=event.transfer_id,
            cause=event.cause,
            fields=dict(event.fields),
        )
