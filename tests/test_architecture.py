"""The rules that a machine can check: size budgets, import contracts, banned calls, clean imports, current stubs."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("isthmus", "router", "prefill_service", "decode_service", "kv_transfer", "kernels")
BUDGETED = (*(package for package in PACKAGES if package != "kernels"), "tools", "benchmarks")
OUTER = ("isthmus/cli/", "isthmus/client/", "isthmus/testing/")  # counted apart from the serving path
FAULTS = (
    "isthmus/failpoints.py",
    "kv_transfer/faulty_wire.py",
)  # they serve tests, and are counted with isthmus/testing
# Two libraries of their own, each with its budget: the kernels, and what a model directory says in words and numbers.
KERNELS = ("kernels/",)
MODEL_DIRECTORY = ("isthmus/checkpoint/", "isthmus/text/")
SERVING_LINES, OUTER_LINES, KERNELS_LINES, MODEL_DIRECTORY_LINES = 10_000, 8_000, 3_500, 1_500
FILE_LINES, FILE_LINES_HARD = 300, 400
FUNCTION_LINES, FUNCTION_LINES_HARD, KERNEL_LINES = 40, 60, 120
PUBLIC_METHODS, PUBLIC_METHODS_HARD = 10, 14
# Over the soft limit, under the hard one, with the reason: "path" or "path::name" of a function or class.
OVER_SOFT_LIMIT: dict[str, str] = {}

BANNED_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_NAMES = {"eval", "exec"}
BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "torch.load", "torch.save"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
# Words of machines: home and work folders, and the hosts or options that name a package index.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home)/[\w.]")
REGISTRY = re.compile(r"https?://\S*(?:pypi|/simple\b|registry|artifactory|nexus)|(?:extra-)?index-url[= ]\S*//")


def sources(*folders: str) -> list[Path]:
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in files if "isthmus/v1" not in path.as_posix())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def file_lines(*folders: str) -> dict[str, int]:
    return {name_of(path): len(path.read_text().splitlines()) for path in sources(*folders)}


def function_lines(*folders: str) -> dict[str, int]:
    sizes = {}
    for path in sources(*folders):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                sizes[f"{name_of(path)}::{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
    return sizes


def over_limit(sizes: dict[str, int], soft: int, hard: int) -> list[str]:
    return [f"{name}: {size}" for name, size in sizes.items() if size > (hard if name in OVER_SOFT_LIMIT else soft)]


DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstring_lines(path: Path) -> set[int]:
    found = (node.body[0] for node in ast.walk(tree(path)) if isinstance(node, DOCUMENTED) and ast.get_docstring(node))
    return {number for node in found for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def code_lines(path: Path) -> int:
    lines, documented = enumerate(path.read_text().splitlines(), 1), docstring_lines(path)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in documented)


def test_line_budgets() -> None:
    """Lines of code, as cloc counts them: blank lines, comments and docstrings are free, nobody should save on them."""
    lines = {name_of(path): code_lines(path) for path in sources(*PACKAGES)}
    budgets = {OUTER + FAULTS: OUTER_LINES, KERNELS: KERNELS_LINES, MODEL_DIRECTORY: MODEL_DIRECTORY_LINES}
    beside = {names: sum(count for name, count in lines.items() if name.startswith(names)) for names in budgets}
    assert sum(lines.values()) - sum(beside.values()) <= SERVING_LINES
    assert {names: count for names, count in beside.items() if count > budgets[names]} == {}


def test_file_sizes() -> None:
    assert over_limit(file_lines(*BUDGETED, "kernels"), FILE_LINES, FILE_LINES_HARD) == []


def test_function_sizes() -> None:
    assert over_limit(function_lines(*BUDGETED), FUNCTION_LINES, FUNCTION_LINES_HARD) == []
    assert over_limit(function_lines("kernels"), KERNEL_LINES, KERNEL_LINES) == []


def test_soft_limit_exceptions_are_needed() -> None:
    over = [
        *over_limit(file_lines(*BUDGETED, "kernels"), FILE_LINES, FILE_LINES),
        *over_limit(function_lines(*BUDGETED), FUNCTION_LINES, FUNCTION_LINES),
        *over_limit(class_methods(*PACKAGES), PUBLIC_METHODS, PUBLIC_METHODS),
    ]
    assert set(OVER_SOFT_LIMIT) <= {line.rpartition(": ")[0] for line in over}


def class_methods(*folders: str) -> dict[str, int]:
    classes = ((path, n) for path in sources(*folders) for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef))
    return {f"{name_of(path)}::{node.name}": len(public_methods(node)) for path, node in classes}


def test_classes_have_few_public_methods() -> None:
    assert over_limit(class_methods(*PACKAGES), PUBLIC_METHODS, PUBLIC_METHODS_HARD) == []


def public_methods(node: ast.ClassDef) -> list[str]:
    methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    plain = (m for m in methods if not any(dotted(d) == "property" for d in m.decorator_list))
    return [m.name for m in plain if not m.name.startswith("_")]


def references(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute, called name and imported module or name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            yield node.lineno, dotted(node)
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.lineno, f"{node.func.id}()"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, f"import {alias.name.split('.')[0]}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, f"import {(node.module or '').split('.')[0]}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def found(banned: set[str], *folders: str) -> list[str]:
    pairs = ((path, ref) for path in sources(*folders) for ref in references(path))
    return [f"{name_of(path)}:{line} {name}" for path, (line, name) in pairs if name in banned]


def test_nothing_is_pickled_or_evaluated() -> None:
    banned = {f"import {m}" for m in BANNED_IMPORTS} | {f"{n}()" for n in BANNED_NAMES} | BANNED_ATTRIBUTES
    assert found(banned, *PACKAGES, "tools", "benchmarks", "tests") == []


def test_environment_is_read_in_one_file() -> None:
    readers = {hit.split(":")[0] for hit in found(ENVIRONMENT, *PACKAGES)}
    assert readers <= {"isthmus/config.py"}


IMPORT_ALL = """
import importlib, os, pkgutil, signal, sys, threading
package, torch_allowed = sys.argv[1], sys.argv[2] == "torch"
if torch_allowed:
    import torch, triton  # what they do on import is theirs
def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return dict(os.environ), os.getcwd(), handlers, threading.enumerate()
watched = ("socket.connect", "socket.bind", "subprocess.Popen", "os.fork", "os.kill", "os.mkdir", "os.remove")
done = []
before = state()
sys.addaudithook(lambda event, args: done.append((event, args)) if event in watched else None)
for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert not done, done
assert state() == before
assert torch_allowed or not {"torch", "triton", "transformers"} & set(sys.modules)
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_has_no_side_effects(package: str) -> None:
    torch = "no torch" if package in {"router", "kv_transfer"} else "torch"
    outcome = run(sys.executable, "-c", IMPORT_ALL, package, torch)
    assert outcome.stdout + outcome.stderr == ""
    assert outcome.returncode == 0


def test_no_installed_distribution_shares_our_names() -> None:
    ours = {*PACKAGES, "tests", "tools", "benchmarks"}
    owners = importlib.metadata.packages_distributions()
    assert {name: owners[name] for name in ours & set(owners) if set(owners[name]) != {"isthmus"}} == {}


def test_import_contracts_are_kept() -> None:
    outcome = run(str(Path(sys.executable).with_name("lint-imports")))
    assert outcome.returncode == 0, outcome.stdout


def test_torch_contract_names_every_shared_module() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    listed = next(c["source_modules"] for c in contracts if "torch and triton" in c["name"])
    modules = {p.stem for p in (ROOT / "isthmus").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    free = {f"isthmus.{name}" for name in modules - {"__init__", "model", "engine", "testing", "worker"}}
    assert free == {name for name in listed if name.startswith("isthmus.")}


def test_generated_stubs_are_current() -> None:
    outcome = run(sys.executable, "tools/generate_stubs.py", "--check")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_no_machine_paths_or_registries_are_committed() -> None:
    listing = run("git", "ls-files", "--cached", "--others", "--exclude-standard").stdout.split("\n")
    hits = []
    for path in (ROOT / name for name in listing if name and (ROOT / name).is_file()):
        if path.suffix in {".safetensors", ".bin"} or path.name in {"tokenizer.json", "LICENSE"}:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line) or REGISTRY.search(line):
                hits.append(f"{name_of(path)}:{number}")
    assert hits == []


def test_lua_files_declare_their_keys() -> None:
    for path in (ROOT / "kv_transfer").rglob("*.lua"):
        lines = path.read_text().splitlines()
        body_start = next(i for i, line in enumerate(lines) if not line.startswith("--"))
        header, body = "\n".join(lines[:body_start]), "\n".join(lines[body_start:])
        used = set(re.findall(r"(?:KEYS|ARGV)\[\d+\]", body))
        assert "KEYS[1]" in used, f"{path.name} works on keys it does not declare"
        assert {name for name in used if name not in header} == set(), path.name


def test_tests_run_with_one_thread_per_process() -> None:
    assert os.environ["OMP_NUM_THREADS"] == "1"
