"""The examples of docs/client.md run as they stand, against a stack with two routers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from isthmus.testing.stack import Stack

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SILENT = ("emitted_token_ids",)  # these assert instead of printing

pytestmark = pytest.mark.e2e


def title(example: str) -> str:
    before = PAGE[: PAGE.index(example)]
    return re.findall(r"^## (.*)$", before, re.MULTILINE)[-1]


@pytest.mark.parametrize("example", EXAMPLES, ids=title)
def test_example_runs(stack: Stack, example: str) -> None:
    first, second = stack.routers
    program = example.replace("127.0.0.1:50051", first).replace("127.0.0.1:50052", second)
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert outcome.stderr == ""
    assert outcome.returncode == 0
    assert outcome.stdout or any(word in example for word in SILENT)


def test_every_section_that_calls_the_library_has_an_example() -> None:
    assert {title(example) for example in EXAMPLES} >= {"Streaming", "asyncio", "Ending early", "Errors"}
    assert len(EXAMPLES) == PAGE.count("```python")
