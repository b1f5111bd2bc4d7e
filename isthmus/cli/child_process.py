"""One child process: started so that it dies with its parent, its output in a log file."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

from isthmus.cli.stack_plan import ChildSpec
from isthmus.config import checkout_root, worker_environment

_LAUNCHER = Path(__file__).with_name("child_launcher.py")
_TAIL_BYTES = 64 << 10
_MAX_WORDS = 600


def launched(command: tuple[str, ...], death_signal: signal.Signals = signal.SIGKILL) -> tuple[str, ...]:
    """The command that runs `command` and has the kernel send it `death_signal` when the calling thread ends."""
    return (sys.executable, "-I", "-S", str(_LAUNCHER), str(int(death_signal)), str(os.getpid()), *command)


class Child:
    """One child of the stack: one process at a time. Written by the supervisor's task that keeps it."""

    def __init__(self, spec: ChildSpec, log_dir: Path):
        self.spec = spec
        self.log_path = log_dir / f"{spec.name}.log"
        self.num_restarts = 0  # processes after the first
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the running process, None when there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def restarts(self) -> None:
        """Counts the process that is about to be started in place of one that ended."""
        self.num_restarts += 1

    async def start(self) -> None:
        """Starts a process; its output is added to the log."""
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *launched(self.spec.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which drains
                cwd=checkout_root(),
                env=worker_environment(),
            )

    async def wait(self) -> int:
        """The exit status; negative for a signal."""
        assert self._process is not None, "started"
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the process and to whatever it started; nothing happens when there is none."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def last_words(self) -> str:
        """The line that says why it could not start, else its last line, cut to a bound."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        refusals = [line for line in lines if "cannot start: " in line]
        return (refusals or lines or ["it said nothing"])[-1][:_MAX_WORDS]
