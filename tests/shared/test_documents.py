"""What the documents name exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("document", ["docs/failures.md", "ARCHITECTURE.md", "README.md"])
def test_every_test_a_document_names_exists(document: str) -> None:
    for path, name in NAMED.findall((ROOT / document).read_text()):
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert not name or name in functions, f"{document} names {path}::{name}"


@pytest.mark.parametrize(
    "document", ["ARCHITECTURE.md", "README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_every_file_a_document_names_exists(document: str) -> None:
    path = ROOT / document if (ROOT / document).exists() else ROOT / "docs" / document
    text = path.read_text()
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    assert [link for link in linked if not (path.parent / link).exists()] == []
    named = re.findall(
        r"`((?:router|decode_service|prefill_service|kv_transfer|kernels|isthmus|tools|benchmarks)/[\w/]+\.\w+)`", text
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_name_of_the_glossary_is_where_it_says() -> None:
    """A place is a file or package and, after it, names: `router` `Attempt`. A message's name needs no place."""
    missing: list[str] = []
    rows = [row for row in (ROOT / "docs" / "glossary.md").read_text().splitlines() if row.startswith("| **")]
    for row in rows:
        text = text_below(ROOT / "proto")
        for quoted in re.findall(r"`([^`]+)`", row.strip("| ").split(" | ")[-1]):
            if (ROOT / quoted).exists():
                text += text_below(ROOT / quoted)
            elif re.fullmatch(r"[A-Za-z_.]+", quoted):
                missing += [f"{row[:40]}: {name}" for name in quoted.split(".") if not re.search(rf"\b{name}\b", text)]
    assert rows
    assert missing == []


def text_below(place: Path) -> str:
    """Of a file, or of every Python and proto file of a folder."""
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.suffix in (".py", ".proto")]
    return "\n".join(file.read_text() for file in files)
