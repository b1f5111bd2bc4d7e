"""Checkpoints written once a session, and which configurations a run tries."""

from functools import cache

import pytest

from tests.oracle.configs import FEW_SEEDS, SEEDS, random_config
from tests.oracle.models import Write, Written, write_model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [] if SEEDS else [item for item in items if item.get_closest_marker("oracle")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`seed` in a test's arguments: the test runs for each; a module's own FEW_SEEDS holds without ORACLE_SEEDS."""
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(SEEDS or getattr(metafunc.module, "FEW_SEEDS", FEW_SEEDS)))


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes `random_config(architecture, seed)`, the same directory each time."""

    @cache
    def write(architecture: str, seed: int) -> Written:
        config = random_config(architecture, seed)
        return write_model(tmp_path_factory.mktemp(config.name), config)

    return write
