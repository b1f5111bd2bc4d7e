"""What a running stack leaves for others to find: stack.json in its state directory, and a note of where that is."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.config import runtime_dir
from isthmus.errors import CannotStart

_PREFIX = "isthmus-stack-"


@dataclass(slots=True)
class StateDir:
    """The directory of one supervisor. A temporary one goes with it, unless it failed: then its logs are wanted."""

    path: Path
    temporary: bool
    keep: bool = False

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def stack_file(self) -> Path:
        return self.path / "stack.json"

    def write(self, stack: dict[str, Any]) -> None:
        """Atomic: a reader sees the old object or the new one."""
        _write_atomic(self.stack_file, json.dumps(stack))


@contextlib.contextmanager
def open_state_dir(given: Path | None) -> Generator[StateDir]:
    """Raises CannotStart when the directory cannot be made or another supervisor lives in it."""
    if given is not None and (other := _supervisor_of(given)) is not None:
        raise CannotStart(
            "state_dir", f"{given} belongs to the running stack of process {other}", "give another --state-dir"
        )
    try:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX)) if given is None else given.resolve()
        state = StateDir(path, temporary=given is None)
        state.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart("state_dir", str(error), "give a directory that can be written with --state-dir") from error
    try:
        yield state
    finally:
        if state.temporary and not state.keep:
            shutil.rmtree(state.path, ignore_errors=True)
        else:
            state.stack_file.unlink(missing_ok=True)


@contextlib.contextmanager
def noted(state: StateDir) -> Generator[None]:
    """This stack can be found by `newest_stack` while the block runs."""
    directory = runtime_dir()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    note = note_of(os.getpid())
    _write_atomic(
        note, json.dumps({"start": _start_ticks(os.getpid()), "dir": str(state.path), "temporary": state.temporary})
    )
    _prune(directory)
    try:
        yield
    finally:
        note.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another stack's note is there
            directory.rmdir()


def newest_stack() -> dict[str, Any] | None:
    """The stack.json of this user's youngest running supervisor, ready ones first."""
    directory = runtime_dir()
    if not directory.is_dir() or directory.stat().st_uid != os.getuid():
        return None
    notes = sorted(directory.glob("*.json"), key=lambda note: note.stat().st_mtime, reverse=True)
    contents = [content for note in notes if (content := _read_note(note)) and _is_alive(note, content)]
    stacks = [stack for content in contents if (stack := read_stack(Path(content["dir"])))]
    return next((stack for stack in stacks if stack.get("ready")), stacks[0] if stacks else None)


def note_of(supervisor: int) -> Path:
    return runtime_dir() / f"{supervisor}.json"


def is_running(pid: int) -> bool:
    return _start_ticks(pid) is not None


def read_stack(directory: Path) -> dict[str, Any] | None:
    try:
        return json.loads((directory / "stack.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _prune(directory: Path) -> None:
    """Notes, and temporary directories, of supervisors that were killed."""
    for note in directory.glob("*.json"):
        content = _read_note(note)
        if content is not None and _is_alive(note, content):
            continue
        path = Path(content["dir"]) if content else None
        if content and path and content.get("temporary") and path.name.startswith(_PREFIX):
            shutil.rmtree(path, ignore_errors=True)
        note.unlink(missing_ok=True)


def _supervisor_of(directory: Path) -> int | None:
    stack = read_stack(directory)
    if stack is None or _start_ticks(stack["supervisor"]) != stack.get("supervisor_start"):
        return None
    return int(stack["supervisor"])


def _read_note(note: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"start", "dir"} <= content.keys() else None


def _is_alive(note: Path, content: dict[str, Any]) -> bool:
    return note.stem.isdecimal() and _start_ticks(int(note.stem)) == content["start"]


def start_ticks() -> int | None:
    """When this process started: with its pid, an identity that a reused pid does not share."""
    return _start_ticks(os.getpid())


def _start_ticks(pid: int) -> int | None:
    """None when there is no such process. Field 22 of /proc/PID/stat; the name before it may hold spaces."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def _write_atomic(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
