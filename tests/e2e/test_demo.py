"""The demo as a new user runs it: real answers, a table, nothing left behind."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil


def processes_with(tmp_path: Path) -> list[str]:
    """Command lines of the processes that have this folder for their temporary files, as those of one demo do."""
    found: list[str] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(tmp_path):
                found.append(" ".join(process.cmdline()))
    return found


def test_the_demo_answers_shows_a_table_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "isthmus.cli", "demo"]
    demo = subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not any("decode_service" in line for line in processes_with(tmp_path)):
        assert demo.poll() is None, "its processes are seen while it runs"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    out, err = demo.communicate(timeout=100)
    assert demo.returncode == 0, err
    lines = out.splitlines()
    assert any(line.startswith("request") and "TTFT" in line and "served by" in line for line in lines)
    assert sum("prefill-0 > decode-0" in line for line in lines) >= 8
    assert any(line.endswith("Your name is Anna.") for line in lines), "the second turn knows the first"
    assert processes_with(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
