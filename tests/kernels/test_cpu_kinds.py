"""No verdict depends on the processor that runs it: a small part of `make test-cpu-kinds`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", ["OPENBLAS_CORETYPE=Haswell", "OPENBLAS_CORETYPE=Nehalem", "ATEN_CPU_CAPABILITY=avx2"])
def test_a_row_does_not_see_the_others_with_another_processors_libraries(kind: str) -> None:
    name, _, value = kind.partition("=")
    tests = ["tests/kernels/test_gemm.py", "tests/kernels/test_gemm_fp8.py", "-k", "does_not_see"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, name: value, "TRITON_INTERPRET": "1"}
    outcome = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout[-3000:]
