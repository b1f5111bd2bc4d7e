"""The rules that a machine can check: sizes, ceilings, import contracts, banned calls, clean imports, current stubs."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.architecture_sources import (
    PACKAGES,
    ROOT,
    classes,
    code_lines,
    dotted,
    functions,
    name_of,
    num_lines,
    references,
    sources,
    tree,
)

BESIDE = ("tools", "benchmarks")
FILE_LINES, FILE_LINES_HARD, TEST_FILE_LINES = 300, 400, 500
FUNCTION_LINES, FUNCTION_LINES_HARD, KERNEL_LINES = 40, 60, 120
PUBLIC_METHODS, PUBLIC_METHODS_HARD = 10, 14
NODES_A_LINE = 30  # syntax nodes, on average over a function: what is squeezed is written out
# Over the soft limit, under the hard one, with the reason: "path" or "path::name" of a function or class.
OVER_SOFT_LIMIT: dict[str, str] = {
    "router/pool/session.py::Session": "one state machine with two sides: what requests ask, what its driver tells",
}
# Lines of code a room may have, docstrings and comments not counted. A commit may raise one, with a sentence why.
CEILINGS: dict[str, tuple[int, str]] = {
    "isthmus": (1_000, "what everything shares: types, errors, settings, clock, ids, ledger; no room of its own"),
    "isthmus/checkpoint": (1_000, "what a model directory says; grows with each family of models"),
    "isthmus/cli": (2_200, "the command line and the supervisor of a local stack"),
    "isthmus/client": (1_000, "two faces over one core"),
    "isthmus/engine": (1_600, "two backends, host and device samplers, graphs"),
    "isthmus/kv": (500, "the cache as data"),
    "isthmus/model": (1_200, "plain torch and the kernels' model beside it"),
    "isthmus/process": (1_000, "what every process has: ports, health, status, drain"),
    "isthmus/testing": (1_400, "stacks, virtual time, fake engines and wires; simulators grow here"),
    "isthmus/text": (800, "tokenizer, templates, detokenizer, ends"),
    "isthmus/worker": (500, "what both kinds of worker share"),
    "kernels": (3_800, "one folder an operation, definition included"),
    "kv_transfer": (2_300, "the wire: both sides, each core and driver"),
    "kv_transfer/ownership": (1_400, "store, twin, lease, mirror, membership, each core and driver"),
    "decode_service": (2_200, "streams, reservations, attachments, moves, the step loop"),
    "prefill_service": (900, "prompts, tiles, publishing"),
    "router": (3_200, "request life, sessions, placement, admission, the gRPC face"),
}
# Words that say nothing about what a file holds.
IDLE_FILE_NAMES = {
    *("drive", "call", "room", "text", "courier", "harm", "wake", "events", "stopping", "misc"),
    *("util", "utils", "helper", "helpers", "common", "manager", "handler", "base", "stuff"),
}

BANNED_IMPORTS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BANNED_NAMES = {"eval", "exec"}
BANNED_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "torch.load", "torch.save"}
ENVIRONMENT = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
# Words of machines: home and work folders, and the hosts or options that name a package index.
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:work|root|home)/[\w.]")
REGISTRY = re.compile(r"https?://\S*(?:pypi|/simple\b|registry|artifactory|nexus)|(?:extra-)?index-url[= ]\S*//")
MARKDOWN_LINE = 110


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def file_lines(*folders: str) -> dict[str, int]:
    return {name_of(path): len(path.read_text().splitlines()) for path in sources(*folders)}


def function_lines(*folders: str) -> dict[str, int]:
    return {name: num_lines(node) for path in sources(*folders) for name, node in functions(path)}


def public_methods(node: ast.ClassDef) -> list[str]:
    methods = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    plain = (m for m in methods if not any(dotted(d) == "property" for d in m.decorator_list))
    return [m.name for m in plain if not m.name.startswith("_")]


def class_methods(*folders: str) -> dict[str, int]:
    found = ((path, node) for path in sources(*folders) for node in classes(path))
    return {f"{name_of(path)}::{node.name}": len(public_methods(node)) for path, node in found}


def over_limit(sizes: dict[str, int], soft: int, hard: int) -> list[str]:
    return [f"{name}: {size}" for name, size in sizes.items() if size > (hard if name in OVER_SOFT_LIMIT else soft)]


def room_of(name: str) -> str:
    """The longest folder with a ceiling that holds the file."""
    return max((room for room in CEILINGS if name.startswith(f"{room}/")), key=len)


def test_no_room_is_over_its_ceiling() -> None:
    lines: Counter[str] = Counter()
    for path in sources(*PACKAGES):
        lines[room_of(name_of(path))] += code_lines(path)
    assert {room: count for room, count in lines.items() if count > CEILINGS[room][0]} == {}
    assert lines.keys() == CEILINGS.keys(), "a ceiling without a room"


def test_file_sizes() -> None:
    assert over_limit(file_lines(*PACKAGES, *BESIDE), FILE_LINES, FILE_LINES_HARD) == []
    assert over_limit(file_lines("tests"), TEST_FILE_LINES, TEST_FILE_LINES) == []


def test_function_sizes() -> None:
    plain = [package for package in (*PACKAGES, *BESIDE) if package != "kernels"]
    assert over_limit(function_lines(*plain), FUNCTION_LINES, FUNCTION_LINES_HARD) == []
    assert over_limit(function_lines("kernels"), KERNEL_LINES, KERNEL_LINES) == []


def test_classes_have_few_public_methods() -> None:
    assert over_limit(class_methods(*PACKAGES), PUBLIC_METHODS, PUBLIC_METHODS_HARD) == []


def test_soft_limit_exceptions_are_needed() -> None:
    over = [
        *over_limit(file_lines(*PACKAGES, *BESIDE), FILE_LINES, FILE_LINES),
        *over_limit(function_lines(*PACKAGES, *BESIDE), FUNCTION_LINES, FUNCTION_LINES),
        *over_limit(class_methods(*PACKAGES), PUBLIC_METHODS, PUBLIC_METHODS),
    ]
    assert set(OVER_SOFT_LIMIT) <= {line.rpartition(": ")[0] for line in over}


def test_no_function_is_squeezed() -> None:
    found = ((name, node) for path in sources(*PACKAGES, *BESIDE) for name, node in functions(path))
    dense = {name: sum(1 for _ in ast.walk(node)) / num_lines(node) for name, node in found}
    assert {name: round(nodes) for name, nodes in dense.items() if nodes > NODES_A_LINE} == {}


def packs_unrelated(node: ast.Assign) -> bool:
    """`a, b = x, y`: two assignments on one line. A swap, or one that reads what it writes, has to be one."""
    target, value = node.targets[0], node.value
    if not (isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)):
        return False
    written = {ast.unparse(element) for element in target.elts}
    read = {ast.unparse(part) for element in value.elts for part in ast.walk(element) if isinstance(part, ast.expr)}
    return not written & read


def test_one_assignment_a_line() -> None:
    found = ((path, node) for path in sources(*PACKAGES, *BESIDE) for node in ast.walk(tree(path)))
    packed = [f"{name_of(path)}:{n.lineno}" for path, n in found if isinstance(n, ast.Assign) and packs_unrelated(n)]
    assert packed == []


def test_a_class_name_means_one_thing() -> None:
    """Names that begin with an underscore are a file's own business."""
    places: defaultdict[str, list[str]] = defaultdict(list)
    for path in sources(*PACKAGES):
        for node in classes(path):
            places[node.name].append(name_of(path))
    shared = {name: where for name, where in places.items() if len(where) > 1 and not name.startswith("_")}
    assert shared == {}


def test_file_names_tell() -> None:
    assert [name_of(path) for path in sources(*PACKAGES) if path.stem in IDLE_FILE_NAMES] == []


def test_prose_fits_the_page() -> None:
    """Outside code blocks and tables."""
    wide = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tests").rglob("*.md")]:
        in_code = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            in_code ^= line.startswith("```")
            if not in_code and not line.startswith("|") and len(line) > MARKDOWN_LINE:
                wide.append(f"{name_of(path)}:{number}")
    assert wide == []


PLACE = re.compile(r"`([\w/.-]+\.py):(\w+(?:\.\w+)?)`")


def test_places_that_the_architecture_names_exist() -> None:
    """`file:function` and `file:Class.method`."""
    missing = []
    for file, name in PLACE.findall((ROOT / "ARCHITECTURE.md").read_text()):
        path = ROOT / file
        owner, _, method = name.rpartition(".")
        defined = set()
        for node in ast.walk(tree(path)) if path.is_file() else ():
            if isinstance(node, ast.ClassDef):
                inner = {n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
                defined |= {f"{node.name}.{one}" for one in inner} | {node.name}
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                defined.add(node.name)
        if (f"{owner}.{method}" if owner else method) not in defined:
            missing.append(f"{file}:{name}")
    assert missing == []


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
