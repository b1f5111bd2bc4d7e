"""No test was lost in the redesign: each one of the list still exists, or its successors do."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "tests" / "successors"


def names_in(file: Path) -> set[str]:
    name = file.relative_to(ROOT).as_posix()
    functions = (
        n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return {f"{name}::{function.name}" for function in functions if function.name.startswith("test_")}


def test_every_test_of_before_exists_or_has_a_successor() -> None:
    before = set((TABLES / "before.txt").read_text().split())
    now = set[str]().union(*map(names_in, (ROOT / "tests").rglob("test_*.py")))
    moved: dict[str, list[str]] = {}
    for table in TABLES.glob("*.tsv"):
        for line in table.read_text().splitlines():
            old, new, _why = line.split("\t")
            moved[old] = [name.strip() for name in new.split(",")]

    assert before - now - moved.keys() == set(), "lost"
    assert {name for names in moved.values() for name in names} - now == set(), "successors that do not exist"
    assert moved.keys() - before == set(), "not in the list"
