"""Generates the gRPC stubs under isthmus/v1 from proto/; `--check` fails when the committed ones are stale."""

import argparse
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("isthmus/v1")


def generate(out: Path) -> None:
    protos = sorted(str(p) for p in (ROOT / "proto" / PACKAGE).glob("*.proto"))
    plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto'}"]
    command.append(f"--plugin=protoc-gen-mypy_grpc={plugin}")
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")] + [f"--mypy_grpc_out=quiet:{out}"]
    subprocess.run([*command, *outputs, *protos], check=True)
    (out / PACKAGE / "__init__.py").touch()


def stale(fresh: Path) -> list[str]:
    names = {p.name for d in (fresh, ROOT) for p in (d / PACKAGE).iterdir() if p.suffix in {".py", ".pyi"}}
    _, mismatch, errors = filecmp.cmpfiles(fresh / PACKAGE, ROOT / PACKAGE, sorted(names), shallow=False)
    return mismatch + errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        if check:
            names = stale(Path(temporary))
            print("stale stubs: " + ", ".join(names) if names else "stubs are current")
            return 1 if names else 0
        shutil.copytree(Path(temporary) / PACKAGE, ROOT / PACKAGE, dirs_exist_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
