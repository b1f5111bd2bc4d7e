"""`isthmus demo`: a stack of separate processes, several prompts at once, what was measured, nothing left behind."""

import argparse
import asyncio
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isthmus.cli import arguments
from isthmus.cli.screen import Screen, open_screen
from isthmus.cli.state_directory import is_running, note_of
from isthmus.cli.table import table
from isthmus.cli.temporary_stack import temporary_stack
from isthmus.client import AsyncClient, Generation, Message
from isthmus.errors import IsthmusError
from isthmus.types import FinishReason

_TIMEOUT_S = 120.0
_HEADER = "request;prompt;cached;generated;TTFT ms;ITL p50;p99 ms;KiB moved;blocks;exposed ms;served by".split(";")


@dataclass(frozen=True, slots=True)
class Ask:
    """One conversation: each turn is sent with all that was said before it."""

    title: str
    turns: tuple[str, ...]
    system: str = ""
    max_tokens: int = 48
    temperature: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class Exchange:
    """One turn of an Ask and what came back."""

    title: str
    question: str
    generation: Generation = field(default_factory=lambda: Generation(seed=0))  # its stream's, once there is one
    error: IsthmusError | None = None


_ASKS = (
    Ask("sum", ("What is 47 + 38?",)),
    Ask("difference", ("What is 81 minus 26?",)),
    Ask("capital", ("What is the capital of Texas?",)),
    Ask("opposite", ("What is the opposite of hot?",)),
    Ask("story 1", ("Tell me a story about a fox and a hen.",), max_tokens=240, temperature=0.7, seed=7),
    Ask("story 2", ("Tell me a story about a child named Clara.",), max_tokens=240, temperature=0.7, seed=11),
    Ask("chat", ("My name is Anna.", "What is my name?"), system="You are a small and friendly assistant."),
)


async def run(parsed: argparse.Namespace) -> int:
    out = sys.stdout
    out.write(f"starting {parsed.prefill} prefill and {parsed.decode} decode, each a process of its own\n")
    out.flush()
    async with temporary_stack(arguments.stack_flags(parsed)) as stack:
        out.write(f"ready: {_processes(stack)}\n\n")
        async with AsyncClient(stack["routers"][0]["grpc"]) as client:
            with open_screen(out) as screen:
                exchanges = await _ask_all(client, screen)
    out.write("\n" + table(_HEADER, [_row(exchange) for exchange in exchanges], right=range(1, 10)))
    failed = [exchange for exchange in exchanges if not _is_whole(exchange)]
    left = _left_behind(stack)
    out.write("\nstopped; no process and no file left\n" if not left else f"\nleft behind: {', '.join(left)}\n")
    return 1 if failed or left else 0


async def _ask_all(client: AsyncClient, screen: Screen) -> list[Exchange]:
    """All conversations at once; in the order they are listed."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(_converse(client, ask, screen)) for ask in _ASKS]
        for task in running:
            for exchange in await task:
                screen.finished(exchange.title, exchange.question, _answer(exchange))
    return [exchange for task in running for exchange in task.result()]


async def _converse(client: AsyncClient, ask: Ask, screen: Screen) -> list[Exchange]:
    said: list[Message] = [{"role": "system", "content": ask.system}] if ask.system else []
    exchanges: list[Exchange] = []
    for number, question in enumerate(ask.turns, start=1):
        title = ask.title if len(ask.turns) == 1 else f"{ask.title}, turn {number}"
        exchange = Exchange(title, question)
        exchanges.append(exchange)
        said.append({"role": "user", "content": question})
        await _exchange(client, ask, said, exchange, screen)
        said.append({"role": "assistant", "content": exchange.generation.text})
    return exchanges


async def _exchange(client: AsyncClient, ask: Ask, said: list[Message], exchange: Exchange, screen: Screen) -> None:
    stream = client.generate(
        chat=said, max_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed, timeout_s=_TIMEOUT_S
    )
    exchange.generation = stream.result
    try:
        async for _ in stream:
            screen.progress(exchange.title, exchange.generation.text)
    except IsthmusError as error:
        exchange.error = error


def _answer(exchange: Exchange) -> str:
    return f"{exchange.error.reason}: {exchange.error.detail}" if exchange.error else exchange.generation.text


def _is_whole(exchange: Exchange) -> bool:
    return exchange.error is None and exchange.generation.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def _row(exchange: Exchange) -> list[str]:
    finished = exchange.generation.finished
    if finished is None:
        return [exchange.title, *"-" * 9, _answer(exchange)[:60]]
    usage = finished.usage
    timings = finished.timings
    workers = finished.workers
    return [
        exchange.title,
        str(usage.num_prompt_tokens),
        str(usage.num_cached_tokens),
        str(usage.num_generated_tokens),
        f"{timings.ttft_ms:.1f}",
        f"{timings.itl_p50_ms:.1f}",
        f"{timings.itl_p99_ms:.1f}",
        f"{timings.transfer_bytes / 1024:.1f}",
        str(timings.transfer_blocks),
        f"{timings.transfer_exposed_ms:.2f}",
        " > ".join(name for name in (workers.router, workers.prefill, workers.decode) if name),
    ]


def _entries(stack: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for pool in ("redis", "routers", "prefill", "decode") for entry in stack[pool]]


def _processes(stack: dict[str, Any]) -> str:
    return ", ".join(f"{entry['name']} (pid {entry['pid']})" for entry in _entries(stack))


def _left_behind(stack: dict[str, Any]) -> list[str]:
    pids = [stack["supervisor"], *(entry["pid"] for entry in _entries(stack))]
    paths = [Path(stack["logs"]).parent, note_of(stack["supervisor"])]
    processes = [f"process {pid}" for pid in pids if is_running(pid)]
    files = [str(path) for path in paths if path.exists()]
    return processes + files
