from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from isthmus.testing.stack import Stack, StackClient, running_stack


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """1P1D on the bundled checkpoint, shared by the tests that leave it as they found it."""
    with running_stack() as stack:
        yield stack


@pytest_asyncio.fixture
async def client(stack: Stack) -> AsyncIterator[StackClient]:
    async with StackClient(stack.router) as client:
        yield client
