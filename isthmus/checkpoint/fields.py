"""Typed reads of a config.json; a wrong value is CannotStart with field, value and what is served."""

import math
from collections.abc import Mapping
from typing import Any

from isthmus.errors import CannotStart


def refused(field: str, value: object, served: tuple[object, ...]) -> CannotStart:
    return _refused(f"{field} is {value!r}; served are {', '.join(map(repr, served))}")


def _refused(problem: str) -> CannotStart:
    return CannotStart("model", f"config.json: {problem}", "use a checkpoint of a served kind")


def check_fixed(fixed: Mapping[str, tuple[object, ...]], raw: Mapping[str, Any], prefix: str = "") -> None:
    """Raises CannotStart with every field that is not as served. An empty list of values leaves a field free."""
    problems = [
        f"{prefix}{field} is {raw[field]!r}; served are {', '.join(map(repr, served))}"
        for field, served in fixed.items()
        if raw.get(field) is not None and served and raw[field] not in served
    ]
    if problems:
        raise _refused("; ".join(problems))


class Fields:
    """Typed reads of a config dictionary; a wrong value is CannotStart with the field's name."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw = raw
        self._prefix = prefix

    def size(self, name: str, default: int | None = None) -> int:
        value = self._given(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise refused(self._prefix + name, value, ("positive integers",))
        return value

    def count(self, name: str) -> int:
        return 0 if self.raw.get(name) in (None, 0) else self.size(name)

    def number(self, name: str, default: float) -> float:
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refused(self._prefix + name, value, ("numbers",))
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self._given(name, default)
        if not isinstance(value, bool):
            raise refused(self._prefix + name, value, (True, False))
        return value

    def _given(self, name: str, default: object) -> object:
        value = self.raw.get(name)
        return default if value is None else value
