"""`isthmus up`: the local stack under one supervisor, until a signal."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from isthmus import log
from isthmus.cli import arguments
from isthmus.cli.stack_plan import Ports, StackSpec, plan
from isthmus.cli.state_directory import StateDir, noted, open_state_dir
from isthmus.cli.supervisor import StackFailed, Supervision, Supervisor

_UP = "\x1b[A"
_CLEAR_BELOW = "\x1b[J"
_BAR_WIDTH = 30
_LOADED = re.compile(r"weights loaded: ([\d,]+) of ([\d,]+) MiB")  # isthmus.worker.engine_start says so


async def run(parsed: argparse.Namespace) -> int:
    def show(ready: dict[str, Any]) -> None:
        sys.stdout.write((json.dumps(ready) if parsed.json else _ready_line(ready)) + "\n")
        sys.stdout.flush()

    await supervise(arguments.stack_spec(parsed), parsed.state_dir, show)
    return 0


async def supervise(spec: StackSpec, state_dir: Path | None, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Until a signal. Raises CannotStart or StackFailed; the logs of a stack that failed stay."""
    with ExitStack() as held:
        state = held.enter_context(open_state_dir(state_dir))
        ports = Ports()
        held.callback(ports.close)
        children = plan(spec, ports, state.path)
        _log_to(state, held)
        held.enter_context(noted(state))
        how = Supervision(
            spec.model,
            _shown(spec.redis_url),
            restart=spec.restart,
            ready_timeout_s=spec.ready_timeout_s,
            on_waiting=Waiting(sys.stderr),
        )
        try:
            await Supervisor(children, state, how).run(on_ready)
        except StackFailed:
            state.keep = True
            raise


def _log_to(state: StateDir, held: ExitStack) -> None:
    stream = held.enter_context((state.logs / "supervisor.log").open("a", encoding="utf-8"))
    log.configure("supervisor", "info", stream)


class Waiting:
    """For a person at a terminal, when a start takes long: a line for each process that does not serve yet."""

    def __init__(self, out: TextIO):
        self._out = out
        self._num_drawn = 0

    def __call__(self, reasons: Mapping[str, str]) -> None:
        """None left clears the lines."""
        if not self._out.isatty():
            return
        lines = "".join(f"{_progress(name, reason)}\n" for name, reason in reasons.items())
        self._out.write(_UP * self._num_drawn + "\r" + _CLEAR_BELOW + lines)
        self._out.flush()
        self._num_drawn = len(reasons)


def _progress(name: str, reason: str) -> str:
    if not (loaded := _LOADED.search(reason)):
        return f"{name:12}{reason}"
    done, total = (int(number.replace(",", "")) for number in loaded.groups())
    filled = _BAR_WIDTH * done // max(1, total)
    return f"{name:12}loading weights [{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {loaded[1]} of {loaded[2]} MiB"


def _shown(redis_url: str | None) -> str | None:
    """host:port, without credentials."""
    return None if redis_url is None else redis_url.partition("://")[2].rpartition("@")[2].partition("/")[0]


def _ready_line(ready: dict[str, Any]) -> str:
    routers = ", ".join(router["grpc"] for router in ready["routers"])
    workers = f"{len(ready['prefill'])} prefill, {len(ready['decode'])} decode"
    return f"ready: router {routers}; {workers}; model {ready['model']}; logs in {ready['logs']}; Ctrl-C stops"
