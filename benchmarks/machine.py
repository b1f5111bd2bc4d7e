"""One line that says what a figure was measured on."""

import os
import platform
from importlib import metadata
from pathlib import Path


def describe() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "grpcio", "pyzmq", "redis"))
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{cores} cores of {model}, load {load:.1f}, Python {platform.python_version()}, {versions}"


def quantile(values: list[float], q: float) -> float:
    """Nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
