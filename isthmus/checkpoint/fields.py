"""Typed reads of a config.json. A wrong value raises CannotStart with the field, the value, and what is served."""

import math
from collections.abc import Mapping
from typing import Any

from isthmus.errors import CannotStart


def refused(field: str, value: object, served: tuple[object, ...]) -> CannotStart:
    """The error for a field whose value is not served."""
    return _refused(f"{field} is {value!r}; served are {', '.join(map(repr, served))}")


def _refused(problem: str) -> CannotStart:
    return CannotStart("model", f"config.json: {problem}", "use a checkpoint of a served kind")


def check_fixed(fixed: Mapping[str, tuple[object, ...]], raw: Mapping[str, Any], prefix: str = "") -> None:
    """Raises CannotStart with every field of `raw` whose value is not among its `fixed` ones.

    A field that is absent, or that has no fixed values, may be anything. `prefix`: what stands before the names shown.
    """
    problems = [
        f"{prefix}{field} is {raw[field]!r}; served are {', '.join(map(repr, served))}"
        for field, served in fixed.items()
        if raw.get(field) is not None and served and raw[field] not in served
    ]
    if problems:
        raise _refused("; ".join(problems))


class Fields:
    """Typed reads of one object of a config.json; null counts as absent. Every method raises CannotStart."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw = raw
        self._prefix = prefix

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; without a default the field has to be there."""
        value = self._given(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise refused(self._prefix + name, value, ("positive integers",))
        return value

    def count(self, name: str) -> int:
        """An integer from 0, which is also what an absent field says."""
        return 0 if self.raw.get(name) in (None, 0) else self.size(name)

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self._given(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise refused(self._prefix + name, value, ("numbers",))
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self._given(name, default)
        if not isinstance(value, bool):
            raise refused(self._prefix + name, value, (True, False))
        return value

    def _given(self, name: str, default: object) -> object:
        value = self.raw.get(name)
        return default if value is None else value
