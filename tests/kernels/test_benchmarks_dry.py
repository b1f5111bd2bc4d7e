"""The GPU benchmarks go through all they do but the timing without a GPU, so that none is spent on finding mistakes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "kernels": ("Ceilings, this run", "Paged MLA decode", "Block-FP8 products", "fp8 experts", "gather", "sampler"),
    "decode_step": ("exactness costs", "transformers ms"),
    "prefill": ("MFU", "chunked"),
    "gpu_stack": ("hand-off ms", "one engine", "transfer GB/s"),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_ends_well_and_writes_its_tables(script: str, tmp_path: Path) -> None:
    out = tmp_path / "out.md"
    process = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--dry-run", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    written = out.read_text(encoding="utf-8")
    assert "Dry run: the figures mean nothing." in written
    assert "Failed:" not in written
    for words in SCRIPTS[script]:
        assert words in written, words


def test_without_a_gpu_only_dry_runs_are_offered(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.prefill", "--out", str(tmp_path / "out.md")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "only --dry-run works here" in process.stderr
