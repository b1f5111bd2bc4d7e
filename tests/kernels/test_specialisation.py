"""No size of a step makes Triton compile a kernel anew: every batch runs the code that the warm-up compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_step_compiles_what_the_warm_up_did_not() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_only", "deepseek-v2-lite"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert int(re.findall(r"warm-up: (\d+) kernels", lines[0])[0]) >= 20
    assert lines[1:] == ["done"]
