"""The static gate: compiles every entry of the kernel table for its architecture, without a GPU, and looks at it.

    python -m tools.kernel_table                    print registers, shared memory, spills, instructions; check them
    python -m tools.kernel_table --update           write what was seen as each entry's `expect`
    python -m tools.kernel_table --only mla_decode --architecture sm_90

An entry fails when it does not compile, does not fit the architecture's shared memory, spills more than its `max_spill`
(0 unless stated), lacks the tensor core instruction it names in `mma`, or differs from its `expect` under the Triton
that made it.
"""

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels.table import ARCHITECTURES, FOLDER, KernelSource, fields

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
WATCHED = ("HGMMA", "QGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCQMMA", "LDGSTS", "LDSM", "LDL", "STL")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def sources() -> dict[str, Any]:
    """Every kernel by name, from the SOURCES of the modules under kernels/."""
    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(kernels.__path__, "kernels."):
        found.update(getattr(importlib.import_module(module.name), "SOURCES", {}))
    return found


def compile_entry(source: KernelSource, entry: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Registers, shared memory, spilled bytes and watched instructions of one entry."""
    names = source.kernel.arg_names
    constants = {**source.constants, **entry["constants"]}
    signature = {name: "constexpr" if name in constants else source.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in source.aligned}
    ast = ASTSource(source.kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attrs)
    options = {"num_warps": entry["num_warps"], "num_stages": entry["num_stages"]}
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(ast, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("cuobjdump", "--dump-sass", file.name)
    instructions = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)", sass, re.MULTILINE))
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[-1]),
        "shared": compiled.metadata.shared,
        "spill": int(re.findall(r"STACK:(\d+)", usage)[-1]),
        **{name: instructions[name] for name in WATCHED if instructions[name]},
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def problems(entry: dict[str, Any], seen: dict[str, Any], architecture: str) -> Iterator[str]:
    if seen["shared"] > SHARED_LIMIT[architecture]:
        yield f"{seen['shared']} bytes of shared memory, {architecture} has {SHARED_LIMIT[architecture]}"
    if seen["spill"] > entry.get("max_spill", 0):
        yield f"{seen['spill']} bytes spilled, {entry.get('max_spill', 0)} allowed"
    if (mma := entry.get("mma")) and not seen.get(mma):
        yield f"no {mma} instruction"
    expect = dict(entry.get("expect", {}))
    if expect.pop("triton", None) == triton.__version__ and expect != seen:
        yield f"expected {expect}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--only", default="", help="kernels whose name begins with this")
    parser.add_argument("--architecture", choices=ARCHITECTURES)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the tables [kernels/tuned]")
    args = parser.parse_args()
    known = sources()
    verdicts = []
    for path in sorted(args.folder.glob("*.json")):
        kernels_of_file = json.loads(path.read_text(encoding="ascii"))
        for kernel, architectures in kernels_of_file.items():
            for architecture, variants in architectures.items():
                if not kernel.startswith(args.only) or args.architecture not in (None, architecture):
                    continue
                for variant, entry in variants.items():
                    verdicts.append(examine(known[kernel], f"{kernel}[{variant}]", entry, architecture, args.update))
        if args.update:
            path.write_text(json.dumps(kernels_of_file, indent=1) + "\n", encoding="ascii")
    print(f"{len(verdicts)} entries, {verdicts.count(False)} failed (Triton {triton.__version__})")
    return 0 if all(verdicts) else 1


def examine(source: Callable, name: str, entry: dict[str, Any], architecture: str, update: bool) -> bool:  # noqa: FBT001
    """Compiles, prints and judges one entry; `update` makes what was seen its `expect`."""
    try:
        seen = compile_entry(source(fields(name[name.index("[") + 1 : -1])), entry, architecture)
        if update:
            entry["expect"] = {"triton": triton.__version__, **seen}
        wrong = list(problems(entry, seen, architecture))
    except Exception as error:  # noqa: BLE001 — an entry that does not compile is what is looked for
        seen = {}
        wrong = [f"{type(error).__name__}: {str(error)[-600:]}"]
    shown = " ".join(f"{key}={value}" for key, value in seen.items())
    print(f"{architecture} {name} {shown}", *(f"\n    FAILED: {line}" for line in wrong), flush=True)
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
