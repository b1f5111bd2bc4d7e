"""`isthmus up` as a process of its own, with a real Redis and stand-ins for the services."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil

_UP = str(Path(__file__).with_name("up_with_stand_ins.py"))
_ROOT = Path(__file__).parents[2]


class Up:
    """A supervisor under test: its process and its ready object."""

    def __init__(self, process: subprocess.Popen[str], directory: Path):
        self.process = process
        self.directory = directory
        self.ready: dict[str, Any] = {}

    @property
    def pids(self) -> list[int]:
        return [entry["pid"] for pool in ("routers", "prefill", "decode", "redis") for entry in self.ready[pool]]

    def stack(self) -> dict[str, Any]:
        return json.loads((self.directory / "stack.json").read_text())

    def status(self, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "isthmus.cli", "status", *flags]
        return subprocess.run(command, env=environment(self.directory), capture_output=True, text=True, timeout=15)


def environment(directory: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ISTHMUS_")}
    return {**kept, "XDG_RUNTIME_DIR": str(directory), "TMPDIR": str(directory), "PYTHONPATH": str(_ROOT)}


def start(directory: Path, mode: str, *flags: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, _UP, mode, "--json", *flags],
        env=environment(directory),
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def running(directory: Path, mode: str = "serve", *flags: str) -> Generator[Up]:
    up = Up(start(directory, mode, "--state-dir", str(directory), *flags), directory)
    try:
        assert up.process.stdout is not None
        up.ready = json.loads(up.process.stdout.readline())
        yield up
    finally:
        up.process.kill()
        up.process.communicate()


def wait_until(is_true: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def refused(directory: Path, mode: str, *flags: str) -> str:
    process = start(directory, mode, *flags)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    return err


def test_stack_from_ready_to_the_end_of_its_drain(tmp_path: Path):
    with running(tmp_path, "serve", "--decode", "2") as up:
        assert_ready_object(up)
        shown = json.loads(up.status("--json").stdout)
        assert [entry["blocks"]["cached"] for entry in shown["decode"]] == [2, 2]
        assert {entry["pid"] for entry in shown["routers"]} == {up.ready["routers"][0]["pid"]}
        assert "9/2/10" in up.status().stdout

        killed = up.ready["decode"][1]
        os.kill(killed["pid"], signal.SIGKILL)
        wait_until(lambda: up.stack()["restarts"]["decode-1"] == 1)
        wait_until(lambda: json.loads(up.status("--json").stdout)["decode"][1]["serving"])
        entry = json.loads(up.status("--json").stdout)["decode"][1]
        assert (entry["grpc"], entry["zmq"], entry["restarts"]) == (killed["grpc"], killed["zmq"], 1)
        assert entry["pid"] != killed["pid"]

        up.process.terminate()
        assert up.process.wait(5) == 0
        assert alive([*up.pids, entry["pid"]]) == []
        assert "no local stack is running" in up.status().stderr
    assert (tmp_path / "logs" / "router-0.log").exists()
    assert not (tmp_path / "stack.json").exists()


def assert_ready_object(up: Up) -> None:
    assert (up.ready["ready"], up.ready["supervisor"], up.ready["model"]) == (True, up.process.pid, "bundled")
    assert [entry["name"] for entry in up.ready["decode"]] == ["decode-0", "decode-1"]
    assert all(set(entry) == {"name", "pid", "grpc", "zmq", "http"} for entry in up.ready["decode"])
    assert all(set(entry) == {"name", "pid", "grpc", "http"} for entry in up.ready["routers"] + up.ready["prefill"])
    assert [set(entry) for entry in up.ready["redis"]] == [{"name", "pid", "address"}]
    assert alive(up.pids) == up.pids
    assert {path.name for path in Path(up.ready["logs"]).iterdir()} >= {"router-0.log", "decode-1.log", "redis.log"}


def test_without_restart_a_dead_child_stays_dead_and_a_killed_supervisor_leaves_none(tmp_path: Path):
    with running(tmp_path, "serve", "--no-restart") as up:
        os.kill(up.ready["prefill"][0]["pid"], signal.SIGKILL)
        wait_until(lambda: up.stack()["prefill"][0]["pid"] is None)
        entry = json.loads(up.status("--json").stdout)["prefill"][0]
        assert (entry["state"], entry["serving"], entry["restarts"]) == ("unreachable", False, 0)
        said = refused(tmp_path, "serve", "--state-dir", str(tmp_path))
        assert f"running stack of process {up.process.pid}" in said

        up.process.kill()
        wait_until(lambda: alive(up.pids) == [], 3)


def test_interrupt_ends_even_a_stubborn_child_in_time_and_temporary_state_goes(tmp_path: Path):
    process = start(tmp_path, "stubborn")
    assert process.stdout is not None
    up = Up(process, tmp_path)
    up.ready = json.loads(process.stdout.readline())
    assert Path(up.ready["logs"]).is_dir()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 0
    assert alive(up.pids) == []
    assert list(tmp_path.iterdir()) == []


def test_child_that_cannot_start_fails_the_stack_with_its_own_words(tmp_path: Path):
    said = refused(tmp_path, "refuse")
    assert "decode-0: isthmus decode: cannot start: model: config.json is missing. To mend it:" in said
    log = Path(said.strip().rpartition("its log: ")[2])
    assert "config.json is missing" in log.read_text()


def test_stack_that_never_serves_says_who_and_why(tmp_path: Path):
    said = refused(tmp_path, "never", "--ready-timeout", "4")
    assert "decode-0: not_ready: layout: block_size 16 != 32; its log: " in said
    assert "router-0" not in said


def test_taken_router_port_is_named(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused(tmp_path, "serve", "--router-port", str(taken.getsockname()[1]))
    assert said.startswith("isthmus up: cannot start: router_port: 127.0.0.1:")
    assert list(tmp_path.iterdir()) == []


def test_output_nobody_reads_ends_the_stack_without_a_word(tmp_path: Path):
    process = start(tmp_path, "serve")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == ""
    process.stderr.close()
    assert list(tmp_path.iterdir()) == []
