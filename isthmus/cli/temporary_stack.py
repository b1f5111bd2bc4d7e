"""A stack for the time of one command: `isthmus up --json` as a child that goes when the command goes."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from isthmus.cli.child_process import launched
from isthmus.cli.supervisor import StackFailed
from isthmus.config import checkout_root, worker_environment

_START_S = 960.0  # its supervisor gives up sooner
_STOP_S = 6.0  # its supervisor takes at most 5
_MAX_LINE_BYTES = 1 << 20


@contextlib.asynccontextmanager
async def temporary_stack(flags: Sequence[str] = ()) -> AsyncGenerator[dict[str, Any]]:
    """Yields the ready object. Raises StackFailed with what the supervisor said."""
    command = (sys.executable, "-m", "isthmus.cli", "up", "--json", *flags)
    process = await asyncio.create_subprocess_exec(
        *launched(command, signal.SIGTERM),  # a killed command leaves a supervisor that still tidies up
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        cwd=checkout_root(),
        env=worker_environment(),
        limit=_MAX_LINE_BYTES,
    )
    try:
        yield await _ready(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await _ended(process)


async def _ready(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None, "piped"
    assert process.stderr is not None, "piped"
    try:
        async with asyncio.timeout(_START_S):
            line = await process.stdout.readline()
            if not line:
                said = (await process.stderr.read()).decode(errors="replace").strip()
                raise StackFailed(said.removeprefix("isthmus up: ") or "the stack ended without a word")
    except TimeoutError as error:
        raise StackFailed(f"no stack after {_START_S:g} s") from error
    return json.loads(line)


async def _ended(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_STOP_S):
            await process.communicate()
    except TimeoutError:
        process.kill()  # its children die with it
        await process.wait()
