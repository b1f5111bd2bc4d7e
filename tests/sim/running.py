"""Coroutines that never wait, run to their end at once: what the in-memory store's calls are."""

from collections.abc import Awaitable
from typing import Any, TypeVar

ValueT = TypeVar("ValueT")


def answer_of(call: Awaitable[ValueT]) -> ValueT:
    coroutine: Any = call.__await__()
    try:
        coroutine.send(None)
    except StopIteration as stopped:
        return stopped.value
    raise AssertionError("a call of the in-memory store waits for nothing")
