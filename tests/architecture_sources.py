"""What the tests of the project's own rules read: files, their syntax trees, sizes and references."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("isthmus", "router", "prefill_service", "decode_service", "kv_transfer", "kernels")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """Python files below the folders, generated ones left out."""
    files = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in files if "isthmus/v1" not in path.as_posix())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute or name; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """(path::name, function) of every function and method."""
    for node in ast.walk(tree(path)):
        if isinstance(node, Function):
            yield f"{name_of(path)}::{node.name}", node


def classes(path: Path) -> Iterator[ast.ClassDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef))


def num_lines(node: ast.AST) -> int:
    lineno = getattr(node, "lineno", 0)
    return (getattr(node, "end_lineno", None) or lineno) - lineno + 1


def docstring_lines(path: Path) -> set[int]:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = (n.body[0] for n in ast.walk(tree(path)) if isinstance(n, documented) and ast.get_docstring(n))
    return {number for node in found for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def code_lines(path: Path) -> int:
    """As cloc counts them: blank lines, comments and docstrings are free, nobody should save on them."""
    documented = docstring_lines(path)
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in documented)


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
