"""Shared by every test: one OpenMP thread, set before anything imports torch, and the skips of this machine."""

import os
from pathlib import Path

# Two torch processes with two spinning OpenMP threads each slow one another down a hundredfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# Triton reads it when a kernel module is imported. Without a device kernels can only be interpreted. Torch is asked
# only where there is a driver: it takes seconds to import.
if not Path("/proc/driver/nvidia").exists() or not has_cuda():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needing_gpu and not has_cuda():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
