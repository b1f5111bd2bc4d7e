"""What failed, and when to stop trying: recovery is free, but a request that takes its workers down must not take them
all. Pure."""

from dataclasses import dataclass, field
from typing import Literal

from isthmus.convert import finish_reason_from_proto
from isthmus.errors import DataLoss, DeadlinePassed, Draining, IsthmusError, RequestKillsWorkers
from isthmus.process.rpc_errors import typed_error
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2

MAX_FRUITLESS = 4  # attempts in a row without a token
MAX_LOSSES = 2  # workers lost at one point of the request

Role = Literal["prefill", "decode"]


class AttemptFailed(Exception):
    """One of an attempt's workers can do no more for it."""

    def __init__(self, role: Role, error: IsthmusError, *, was_computing: bool, has_others: bool = False):
        super().__init__(error.detail)
        self.role: Role = role
        self.error = error
        self.was_computing = was_computing  # the request's own computation ran there
        self.has_others = has_others  # and that of other requests


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

    def note_worker_lost(self, role: Role, num_tokens: int, *, has_others: bool) -> None:
        """A worker died or hung while it computed this request. Raises RequestKillsWorkers the second time.

        Where others were computed too, any of them may be the cause: then a third worker tells, with one at a time.
        """
        self._advance(num_tokens)
        lost = self._lost[role] = self._lost.get(role, 0) + 1
        if lost > MAX_LOSSES or (lost == MAX_LOSSES and not has_others):
            raise RequestKillsWorkers(
                f"{lost} {role} workers were lost while they computed token {num_tokens} of this request; "
                "it is not given to another"
            )

    @property
    def is_suspect(self) -> bool:
        return any(lost >= MAX_LOSSES for lost in self._lost.values())

    def _advance(self, num_tokens: int) -> None:
        if num_tokens > self._num_tokens:
            self._num_tokens = num_tokens
            self._num_fruitless = 0
            self._lost.clear()


def raise_early_end(ended: decode_pb2.StreamEnded) -> None:
    """Decode ended the stream by itself, and not after the token that this router took for the last.

    Raises AttemptFailed, or what ends the request: DeadlinePassed, DataLoss, the worker's own error.
    """
    match finish_reason_from_proto(ended.finish_reason):
        case FinishReason.DEADLINE:
            raise DeadlinePassed("the request's deadline has passed")
        case FinishReason.ERROR:
            raise typed_error(ended.reason, ended.detail or "decode failed")
        case FinishReason.CANCELLED:
            gone = Draining(f"the decode worker ended the stream: {ended.detail}")
            raise AttemptFailed("decode", gone, was_computing=False)
        case _:
            raise DataLoss(f"decode ended the stream after {ended.num_tokens} tokens; the router saw no reason to")
