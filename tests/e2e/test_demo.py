"""The demo as a new user runs it: real answers, a table, nothing left behind."""

import subprocess
import sys
import tempfile
from pathlib import Path

import psutil


def ours() -> set[int]:
    """Processes of this project, whoever started them."""
    names = ("prefill_service", "decode_service", "isthmus.cli", "valkey-server")
    found = set()
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if any(name in command for name in names):
            found.add(process.pid)
    return found


def leftovers() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("isthmus-stack-*"))


def test_the_demo_answers_shows_a_table_and_leaves_nothing(tmp_path: Path) -> None:
    processes, files = ours(), leftovers()
    done = subprocess.run(
        [sys.executable, "-m", "isthmus.cli", "demo"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("request") and "TTFT" in line and "served by" in line for line in lines)
    assert sum("prefill-0 > decode-0" in line for line in lines) >= 8
    assert any(line.endswith("Your name is Anna.") for line in lines), "the second turn knows the first"
    assert ours() <= processes
    assert leftovers() <= files
