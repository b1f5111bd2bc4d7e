"""What a figure was measured on, in one line each for the machine and its GPU."""

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


def describe() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = " ".join(_versions("torch", "grpcio", "pyzmq", "redis"))
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return f"{cores} cores of {model}, load {load:.1f}, Python {platform.python_version()}, {versions}"


def describe_gpu() -> str:
    """Name, memory, driver, clocks as they are, and the versions that compile and launch kernels."""
    fields = "name,memory.total,driver_version,clocks.sm,clocks.mem"
    try:
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        name, memory, driver, sm_clock, memory_clock = shown.split(", ")
        gpu = f"{name}, {memory}, driver {driver}, clocks {sm_clock} and {memory_clock}"
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        gpu = "no GPU"
    return ", ".join((gpu, *_versions("torch", "triton", "transformers")))


def _versions(*names: str) -> Iterator[str]:
    """Of those that are installed; a GPU machine may have a part of the project's packages."""
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            yield f"{name} {metadata.version(name)}"


def quantile(values: list[float], q: float) -> float:
    """Nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
