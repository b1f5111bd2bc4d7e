"""When to stop trying: recovery is free, but a request that takes its workers down must not take them all. Pure."""

from dataclasses import dataclass, field
from typing import Literal

from isthmus.errors import IsthmusError, RequestKillsWorkers

MAX_FRUITLESS = 4  # attempts in a row without a token
MAX_LOSSES = 2  # workers lost at one point of the request

Role = Literal["prefill", "decode"]


@dataclass(slots=True)
class Losses:
    """Of one request. Generation is a pure function: a request that kills workers does so at the same token."""

    _num_tokens: int = 0  # delivered at the last failure
    _num_fruitless: int = 0
    _lost: dict[Role, int] = field(default_factory=dict[Role, int])  # since the last token

    def note_failure(self, error: IsthmusError, num_tokens: int) -> None:
        """An attempt failed. Raises `error` after too many without a token."""
        self._advance(num_tokens)
        self._num_fruitless += 1
        if self._num_fruitless >= MAX_FRUITLESS:
            raise error

    def note_worker_lost(self, role: Role, num_tokens: int, *, in_company: bool) -> None:
        """A worker died or hung while it computed this request. Raises RequestKillsWorkers the second time.

        Where others were computed too, any of them may be the cause: then a third worker tells, with one at a time.
        """
        self._advance(num_tokens)
        lost = self._lost[role] = self._lost.get(role, 0) + 1
        if lost > MAX_LOSSES or (lost == MAX_LOSSES and not in_company):
            raise RequestKillsWorkers(
                f"{lost} {role} workers were lost while they computed token {num_tokens} of this request; "
                "it is not given to another"
            )

    @property
    def is_suspect(self) -> bool:
        return any(lost >= MAX_LOSSES for lost in self._lost.values())

    def _advance(self, num_tokens: int) -> None:
        if num_tokens > self._num_tokens:
            self._num_tokens, self._num_fruitless = num_tokens, 0
            self._lost.clear()
