"""`isthmus explain`: ledgers of several processes and clocks as one story."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest

from isthmus.cli import main
from isthmus.cli.timeline import RequestStory, StoryEvent
from isthmus.client import AsyncClient
from isthmus.process.rpc import bind_grpc, create_server
from isthmus.testing.stack import running_stack
from isthmus.v1 import admin_pb2, admin_pb2_grpc

REQUEST, TRANSFER = "01a1fec1-c258-7323-999f-de489289f659", "e0cd152b" * 4
ZERO_NS = time.monotonic_ns() - 10**9


class Process(admin_pb2_grpc.AdminServiceServicer):
    """A ledger on a machine whose clock is `shift_s` away. Events are (ms, event, request id, transfer id, fields)."""

    def __init__(
        self, name: str, role: str, shift_s: float = 0.0, *events: tuple[float, str, str, str, dict[str, str]]
    ):
        self.name = name
        self.role = role
        self.events = events
        self.shift_ns = int(shift_s * 1e9)
        self.zero_ns = ZERO_NS
        self.workers: list[admin_pb2.WorkerStatus] = []
        self.incarnation = ""
        self.stored: dict[str, dict[str, str]] = {}  # fields by transfer

    async def GetStatus(self, request: Any, context: Any) -> admin_pb2.GetStatusResponse:  # noqa: N802
        return admin_pb2.GetStatusResponse(name=self.name, role=self.role, workers=self.workers)

    async def Ledger(self, request: Any, context: Any) -> admin_pb2.LedgerResponse:  # noqa: N802
        lines = [*enumerate(self.events, 1)]
        if request.request_id == REQUEST:
            now_ms = (time.monotonic_ns() - self.zero_ns) / 1e6
            lines += [(0, (now_ms, "handoff.stored", REQUEST, name, told)) for name, told in self.stored.items()]
        events = [
            admin_pb2.LedgerEvent(
                sequence=number,
                monotonic_ns=self.zero_ns + self.shift_ns + int(ms * 1e6),
                event=event,
                request_id=request_id,
                transfer_id=transfer_id,
                attempt=int(fields.get("attempt", 0)),
                cause=fields.get("cause", ""),
                fields={name: value for name, value in fields.items() if name not in ("attempt", "cause")},
            )
            for number, (ms, event, request_id, transfer_id, fields) in lines
            if request.request_id in (request_id, transfer_id)
        ]
        return admin_pb2.LedgerResponse(
            incarnation=self.incarnation,
            events=events,
            monotonic_ns=time.monotonic_ns() + self.shift_ns,
            name=self.name,
            role=self.role,
        )


@contextlib.asynccontextmanager
async def serving(*processes: Process) -> AsyncGenerator[list[str]]:
    """Their addresses; the first is a router that knows the others as workers."""
    async with contextlib.AsyncExitStack() as held:
        found: list[str] = []
        for process in processes:
            server = create_server()
            admin_pb2_grpc.add_AdminServiceServicer_to_server(process, server)
            found.append(f"127.0.0.1:{bind_grpc(server, '127.0.0.1', 0)}")
            await server.start()
            held.push_async_callback(server.stop, 0)
        for process, address in zip(processes[1:], found[1:], strict=True):
            worker = admin_pb2.WorkerStatus(name=process.name, role=process.role, grpc_address=address)
            processes[0].workers.append(worker)
        yield found


def processes(shift_s: float) -> list[Process]:
    names = {"prefill": "prefill-0", "decode": "decode-1"}
    router = Process(
        "router-0",
        "router",
        0.0,
        (0, "request.accepted", REQUEST, "", {"num_prompt_tokens": "13"}),
        (1, "placement.refused", REQUEST, "", {"worker": "decode-0", "cause": "NO_FREE_BLOCKS"}),
        (40, "request.placed", REQUEST, TRANSFER, {"attempt": "1", **names}),
        (900, "request.finished", REQUEST, "", {"cause": "length", "num_tokens": "64"}),
        (5, "request.accepted", "another", "", {}),
    )
    prefill = Process(
        "prefill-0",
        "prefill",
        shift_s,
        (100, "prefill.started", REQUEST, "", {"cached": "0"}),
        (200, "prefill.tile", REQUEST, "", {"start": "0", "num_tokens": "13", "ms": "99.0"}),
        (150, "transfer.first_frame_sent", REQUEST, TRANSFER, {"attempt": "1"}),
        (300, "prefill.first_token", REQUEST, "", {}),
        (400, "transfer.acked", REQUEST, TRANSFER, {"attempt": "1"}),
    )
    decode = Process(
        "decode-1",
        "decode",
        shift_s / 3,
        (20, "stream.reserved", REQUEST, TRANSFER, {}),
        (250, "transfer.error", "", TRANSFER, {"cause": "BadFrame()"}),
        (350, "handoff.claimed", REQUEST, TRANSFER, {"attempt": "1", "bytes": "6400"}),
        (360, "stream.joined", REQUEST, TRANSFER, {"steps_waited": "3"}),
        (880, "stream.ended", REQUEST, TRANSFER, {"cause": "length"}),
    )
    return [router, prefill, decode]


async def explain(*words: str) -> int:
    return await asyncio.to_thread(main, ["explain", *words])


@pytest.mark.parametrize("shift_s", [0.0, 86_400.0], ids=["one machine", "three machines"])
async def test_events_of_all_clocks_stand_in_the_order_of_time(
    capsys: pytest.CaptureFixture[str], shift_s: float
) -> None:
    async with serving(*processes(shift_s)) as found:
        assert await explain(REQUEST, "--router", found[0], "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [event["event"] for event in shown["events"]] == [
        "request.accepted",
        "placement.refused",
        "stream.reserved",
        "request.placed",
        "prefill.started",
        "transfer.first_frame_sent",
        "prefill.tile",
        "transfer.error",  # knew only its transfer
        "prefill.first_token",
        "handoff.claimed",
        "stream.joined",
        "transfer.acked",
        "stream.ended",
        "request.finished",
    ]
    assert [event["ms"] for event in shown["events"]] == pytest.approx(
        [0, 1, 20, 40, 100, 150, 200, 250, 300, 350, 360, 400, 880, 900], abs=9
    )
    said = shown["summary"]
    assert (said["outcome"], said["is_finished"], said["num_tokens"], said["num_prompt_tokens"]) == (
        *("length", True),
        *(64, 13),
    )
    spans = [said[name] for name in ("queue_ms", "prefill_ms", "claim_ms", "decode_ms")]
    assert spans == pytest.approx([40, 200, 330, 520], abs=18)
    assert (said["steps_waited"], said["num_tiles"]) == (3, 1)
    assert said["refused"] == [{"worker": "decode-0", "reason": "NO_FREE_BLOCKS", "detail": ""}]
    (transfer,) = said["transfers"]
    assert (transfer["from"], transfer["to"], transfer["bytes"], transfer["end"]) == (
        *("prefill-0", "decode-1"),
        *("6400", "acked"),
    )
    assert (shown["not_reached"], shown["silent"]) == ([], [])


async def test_text_tells_the_same_to_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(*processes(0.0)) as found:
        assert await explain(REQUEST, "--router", found[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"request {REQUEST}: finished: length, 64 tokens after a prompt of 13"
    assert any("refused by decode-0: NO_FREE_BLOCKS" in line for line in lines)
    assert any("attempt 1 placed: prefill-0 > decode-1" in line for line in lines)
    assert any(line.split()[:3] == ["transfer", "250.000", "ms"] for line in lines)
    header = next(number for number, line in enumerate(lines) if line.split()[:3] == ["ms", "process", "event"])
    assert len(lines) - header - 2 == 14
    assert lines[header + 2].split()[:3] == ["0.000", "router-0", "request.accepted"]


async def test_processes_that_do_not_answer_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    router, prefill, _ = processes(0.0)
    async with serving(router, prefill) as found:
        router.workers.append(admin_pb2.WorkerStatus(name="decode-1", role="decode", grpc_address="127.0.0.1:1"))
        assert await explain(REQUEST, "--router", f"{found[0]},127.0.0.1:2") == 0
    out = capsys.readouterr().out
    assert "not reached: decode-1 at 127.0.0.1:1\n" in out
    assert "not reached: router at 127.0.0.1:2\n" in out


async def test_a_worker_whose_ledger_lost_the_request_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    router, prefill, _ = processes(0.0)
    async with serving(router, prefill, Process("decode-1", "decode")) as found:
        assert await explain(REQUEST, "--router", found[0]) == 0
    assert "no events from decode-1: restarted since, or too long ago\n" in capsys.readouterr().out


async def test_an_unknown_request_is_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(*processes(0.0)) as found:
        assert await explain("no-such-request", "--router", f"{found[0]},127.0.0.1:2") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("isthmus explain: no ledger knows request no-such-request (asked: router-0,")
    assert "not reached: router at 127.0.0.1:2" in captured.err


def test_absent_routers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", REQUEST, "--router", "127.0.0.1:1, 127.0.0.1:2"]) == 1
    assert "no router answers at 127.0.0.1:1, 127.0.0.1:2" in capsys.readouterr().err


def told(*events: tuple[float, str, str, int, str, dict[str, str]]) -> RequestStory:
    return RequestStory(
        REQUEST,
        [
            StoryEvent(ms, process, event, attempt, "", cause, fields)
            for ms, process, event, attempt, cause, fields in events
        ],
    )


def attempts(story: RequestStory) -> Sequence[str]:
    return [one["what"] for one in story.summary()["attempts"]]


def test_attempts_say_why_there_was_another() -> None:
    first = {"prefill": "prefill-0", "decode": "decode-0"}
    second = {"prefill": "prefill-0", "decode": "decode-1"}
    story = told(
        (0, "router-0", "request.accepted", 0, "", {}),
        (1, "router-0", "request.placed", 1, "", first),
        (5, "router-0", "attempt.failed", 1, "WORKER_LOST", {"failed": "decode", "detail": "connection refused"}),
        (6, "router-0", "request.placed", 2, "", second),
        (7, "decode-1", "stream.replayed", 0, "", {"num_tokens": "100", "ms": "3.1"}),
        (8, "router-0", "request.failed", 2, "CancelledError", {}),
        (9, "router-1", "request.resumed", 0, "", {"index": "120"}),
        (10, "router-1", "request.moved", 1, "", {"worker": "decode-1", "to": "decode-2"}),
        (20, "router-1", "request.finished", 1, "stop", {"num_tokens": "130"}),
    )
    assert attempts(story) == [
        "attempt 1 placed: prefill-0 > decode-0",
        "attempt 1 decode failed: WORKER_LOST connection refused",
        "attempt 2 placed: prefill-0 > decode-1",
        "replayed 100 tokens in 3.1 ms",
        "attempt 2 given up by its router: CancelledError",
        "resumed at token 120",
        "attempt 1 moved from decode-1 to decode-2",
    ]
    assert story.as_text().startswith(f"request {REQUEST}: finished: stop, 130 tokens\n")


@pytest.mark.parametrize(
    ("event", "head"),
    [
        ((9, "router-0", "request.failed", 1, "OVERLOADED", {}), "failed: OVERLOADED"),
        ((9, "decode-0", "stream.joined", 0, "", {"steps_waited": "x"}), "running, or its end is not recorded"),
    ],
    ids=["failed", "running"],
)
def test_a_request_that_has_not_finished_is_told_so(event: Any, head: str) -> None:
    assert (
        told((0, "router-0", "request.accepted", 0, "", {}), event).as_text().startswith(f"request {REQUEST}: {head}")
    )


STORED = {"attempt": "1", "state": "CLAIMED", "decode": "d" * 32, "prefill": "1" * 32}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (STORED, "CLAIMED, attempt 1, prefill-0 > decode-1"),
        (STORED | {"prefill": "e" * 32}, f"CLAIMED, attempt 1, {'e' * 32} > decode-1"),
        ({"cause": "NOT_STORED"}, "no record"),
        ({"cause": "STORE_UNAVAILABLE"}, "decode-1 could not look: STORE_UNAVAILABLE"),
    ],
    ids=["claimed", "of a worker that is gone", "none", "away"],
)
async def test_what_redis_holds_of_a_transfer_stands_beside_the_story(
    capsys: pytest.CaptureFixture[str], fields: dict[str, str], words: str
) -> None:
    router, prefill, decode = processes(0.0)
    prefill.incarnation = "1" * 32
    decode.incarnation = "d" * 32
    decode.stored = {TRANSFER: fields}
    async with serving(router, prefill, decode) as found:
        assert await explain(REQUEST, "--router", found[0], "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert await explain(REQUEST, "--router", found[0]) == 0
    text = capsys.readouterr().out
    assert f"\nRedis now: transfer e0cd152b: {words}\n" in text
    (stored,) = shown["summary"]["stored"]
    assert (stored["transfer_id"], stored["asked"]) == (TRANSFER, "decode-1")
    assert stored["state"] == fields.get("state")
    assert (shown["events"][-1]["event"], len(shown["events"])) == ("handoff.stored", 15), "once, and as the last"


async def test_a_transfer_that_nobody_looked_up_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    router, prefill, _ = processes(0.0)
    async with serving(router, prefill) as found:
        assert await explain(REQUEST, "--router", found[0]) == 0
    assert "Redis now: transfer e0cd152b: nobody who was reached could look\n" in capsys.readouterr().out


@pytest.mark.e2e
async def test_a_request_is_followed_through_a_real_stack(capsys: pytest.CaptureFixture[str]) -> None:
    with running_stack() as stack:
        async with AsyncClient(stack.router) as client:
            generation = await client.complete("Once upon a time", max_tokens=20, ignore_eos=True)
        assert await explain(generation.request_id, "--router", stack.router, "--json") == 0
        shown = json.loads(capsys.readouterr().out)
        assert await explain(generation.request_id, "--router", stack.router) == 0
    assert {event["process"] for event in shown["events"]} == {"router-0", "prefill-0", "decode-0"}
    said = shown["summary"]
    assert (said["outcome"], said["num_tokens"], said["num_tiles"]) == ("length", 20, 1)
    assert [(one["from"], one["to"], one["end"]) for one in said["transfers"]] == [("prefill-0", "decode-0", "acked")]
    assert [(one["asked"], one["cause"]) for one in said["stored"]] == [("decode-0", "NOT_STORED")]
    assert all(said[span] > 0 for span in ("queue_ms", "prefill_ms", "claim_ms", "decode_ms"))
    order: Callable[[str], int] = [event["event"] for event in shown["events"]].index
    assert order("request.accepted") < order("stream.reserved") < order("handoff.claimed") < order("stream.ended")
