"""Wall time and peak memory of loading a checkpoint, beside safetensors reading the same files to the same dtype.

    python -m benchmarks.load DIR [--dtype bf16] [--rounds 3]

Each measurement is a process of its own; the two take turns after one pass that brings the files into the page cache.
safetensors maps a file and reads a page when it is touched, so its tensors are copied once: until then nothing is
loaded. Memory is what the process holds besides mapped files, sampled every five milliseconds; the bound is the weights
in the target dtype and 1.2 times the largest stack of experts.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.machine import describe
from isthmus.checkpoint.directory import Checkpoint
from isthmus.model import load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class PeakMemory:
    """Most anonymous memory beyond what there was at the start, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self._ended = threading.Event()
        self._before = self.bytes = anonymous_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes()) - self._before


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def by_safetensors(folder: Path, dtype: torch.dtype) -> object:
    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= {name: tensor.to(dtype, copy=True) for name, tensor in load_file(file).items()}
    return held


def by_isthmus(folder: Path, dtype: torch.dtype) -> object:
    """As a worker does: the digest is read beside the weights."""
    checkpoint = Checkpoint.open(folder, 4096)
    with ThreadPoolExecutor(1) as hashing:
        digest = hashing.submit(lambda: checkpoint.digest)
        return load_model(checkpoint, dtype, torch.device("cpu")), digest.result()


LOADERS = {"safetensors": by_safetensors, "isthmus": by_isthmus}


def measure(loader: str, folder: Path, dtype: str) -> None:
    with PeakMemory() as peak:
        began = time.monotonic()
        held = LOADERS[loader](folder, DTYPES[dtype])
        spent = time.monotonic() - began
    del held
    print(json.dumps({"seconds": spent, "peak": peak.bytes}))


def run(loader: str, folder: Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.load", str(folder), "--dtype", dtype, "--measure", loader]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def allowed_bytes(folder: Path, dtype: torch.dtype) -> float:
    checkpoint = Checkpoint.open(folder, 4096)
    weights = sum(
        math.prod(entry.shape) * dtype.itemsize
        for name, entry in checkpoint.tensors.items()
        if not name.endswith("_scale_inv")
    )
    experts = checkpoint.config.experts
    stack = 0 if experts is None else experts.num_experts * 2 * experts.width * checkpoint.config.hidden_size
    return weights + 1.2 * stack * dtype.itemsize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=LOADERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure, given.folder, given.dtype)
        return
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{describe()}, OMP_NUM_THREADS={threads}")
    size = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    print(f"{given.folder.name}: {size / 1e9:.2f} GB on disk, to {given.dtype}, median of {given.rounds}")
    assert Checkpoint.open(given.folder, 4096).digest, "it reads every byte, so all is in the page cache now"
    taken: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
    for _ in range(given.rounds):
        for loader, figures in taken.items():
            figures.append(run(loader, given.folder, given.dtype))
    seconds = {loader: statistics.median(one["seconds"] for one in figures) for loader, figures in taken.items()}
    peak = {loader: max(one["peak"] for one in figures) / 1e9 for loader, figures in taken.items()}
    for loader in LOADERS:
        each = " ".join(f"{one['seconds']:.2f}" for one in taken[loader])
        print(f"{loader:12} {seconds[loader]:6.2f} s ({each})  peak {peak[loader]:.2f} GB")
    print(f"time ratio {seconds['isthmus'] / seconds['safetensors']:.2f} (bound 1.5)")
    bound = allowed_bytes(given.folder, DTYPES[given.dtype]) / 1e9
    print(f"peak of the bound {peak['isthmus'] / bound:.3f} ({bound:.2f} GB)")


if __name__ == "__main__":
    main()
