"""Every entry of the kernel table compiles for its architecture, without a GPU, into what the table says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.table import ARCHITECTURES, FOLDER, UnsupportedKernel, lookup, table

ROOT = Path(__file__).resolve().parents[2]
FOR_FP8_ROWS = {"dequantise_rows"}
NOT_INTERPRETED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def gate(*arguments: str, folder: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.kernel_table", *arguments]
    if folder:
        command += ["--folder", str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, env=NOT_INTERPRETED, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_entry_compiles_into_what_the_table_says() -> None:
    """Both cores share the work; what was seen is printed (`-s`, or on failure)."""
    running = {architecture: gate("--architecture", architecture) for architecture in ARCHITECTURES}
    printed = {architecture: process.communicate()[0] for architecture, process in running.items()}
    for architecture, lines in printed.items():
        print(lines)
        assert running[architecture].returncode == 0, lines
        num_entries = sum(len(architectures.get(architecture, {})) for architectures in table().values())
        assert f"{num_entries} entries, 0 failed" in lines
        assert num_entries > 0


def test_every_kernel_has_entries_for_every_architecture_but_fp8_before_hopper() -> None:
    for kernel, architectures in table().items():
        assert set(architectures) <= set(ARCHITECTURES), kernel
        missing = {
            variant for variant in architectures["sm_90"] if variant not in architectures.get("sm_80", {})
        }  # what the oldest lacks
        assert kernel in FOR_FP8_ROWS or all("fp8" in variant or "fp8" in kernel for variant in missing), kernel
        assert set(architectures["sm_100"]) == set(architectures["sm_90"]), kernel


def test_a_pair_that_is_not_in_the_table_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedKernel, match=r"mla_decode\[heads=77\] is not in the kernel table for sm_90"):
        lookup("mla_decode", "heads=77", torch.device("cpu"))


def some_entry(name: str) -> tuple[str, str, dict]:
    """A file, a variant and its entry of one kernel on sm_90."""
    for path in sorted(FOLDER.glob("*.json")):
        kernels_of_file = json.loads(path.read_text(encoding="ascii"))
        if name in kernels_of_file:
            variant, entry = next(iter(kernels_of_file[name]["sm_90"].items()))
            return path.name, variant, entry
    raise AssertionError(f"no kernel {name}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mma": "QGMMA"}, "no QGMMA instruction"),
        ({"expect": {"triton": "TRITON", "registers": 1, "shared": 1, "spill": 0}}, "expected"),
        ({"constants": {"NO_SUCH": 1}}, "FAILED"),
    ],
)
def test_the_gate_refuses(change: dict, said: str, tmp_path: Path) -> None:
    import triton

    file_name, variant, entry = some_entry("rms_norm")
    if "expect" in change:
        change = {"expect": {**change["expect"], "triton": triton.__version__}}
    (tmp_path / file_name).write_text(json.dumps({"rms_norm": {"sm_90": {variant: {**entry, **change}}}}))
    process = gate(folder=tmp_path)
    printed = process.communicate()[0]
    assert process.returncode == 1, printed
    assert said in printed
    assert re.search(r"1 entries, 1 failed", printed)
