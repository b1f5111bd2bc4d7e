"""The committed table of launch configurations: which kernel may run in which variant on which architecture.

`tuned/<room>.json` maps kernel -> architecture -> variant -> {constants, num_warps, num_stages, expect}. A variant is
a string of fields, `heads=16,latent=512,rope=64,rows=bf16`: all that is fixed at compile time and not chosen by tuning.
`expect` is what `tools/kernel_table.py` saw when it compiled the entry: registers, shared memory, spills, instructions.

Nothing is tuned at run time, and nothing here depends on how many rows a step has: the bits of a row must not.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
FOLDER = Path(__file__).parent / "tuned"


class UnsupportedKernel(LookupError):
    """A (kernel, variant, architecture) that is not in the table; the message names all three."""


@dataclass(frozen=True, slots=True)
class Config:
    """How one variant is launched: tile sizes by constexpr name, warps of a program, stages of its loads."""

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class KernelSource:
    """How a variant is compiled ahead of time; each kernel module lists its own in SOURCES, by kernel name."""

    kernel: Any  # the triton.jit function
    signature: Mapping[str, str]  # type of every argument that is no constexpr: "*bf16", "i32", "fp32"
    constants: Mapping[str, Any]  # constexprs that the variant fixes; the table's config adds its own
    aligned: tuple[str, ...] = field(default=())  # arguments that are multiples of 16: pointers, strides, sizes


KernelSources = Mapping[str, Callable[[Mapping[str, str]], KernelSource]]


def lookup(kernel: str, variant: str, device: torch.device) -> Config:
    """The entry for this device. Raises UnsupportedKernel. On the CPU, where kernels are interpreted: sm_90's."""
    architecture = architecture_of(device)
    entry = table().get(kernel, {}).get(architecture, {}).get(variant)
    if entry is None:
        raise UnsupportedKernel(f"{kernel}[{variant}] is not in the kernel table for {architecture}")
    return Config(entry["constants"], entry["num_warps"], entry["num_stages"])


@cache
def architecture_of(device: torch.device) -> str:
    """`sm_<major><minor>`; the CPU stands for sm_90."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def table() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Every entry, by kernel, architecture, variant."""
    merged: dict[str, Any] = {}
    for path in sorted(FOLDER.glob("*.json")):
        merged |= json.loads(path.read_text(encoding="ascii"))
    return merged


def fields(variant: str) -> dict[str, str]:
    """`a=1,b=x` as a dict."""
    return dict(part.split("=", 1) for part in variant.split(","))
