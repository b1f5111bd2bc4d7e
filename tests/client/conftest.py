"""One stack for all tests of the client that need real processes: two of each kind, so that any may be lost."""

from collections.abc import Iterator

import pytest

from isthmus.testing.stack import Stack, running_stack


@pytest.fixture(scope="package")
def stack() -> Iterator[Stack]:
    with running_stack("--routers", "2", "--prefill", "2", "--decode", "2") as stack:
        yield stack
