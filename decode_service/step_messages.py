"""What the event loop posts to the step loop, and what comes back. Values; a run travels with its ownership."""

from collections.abc import Sequence
from dataclasses import dataclass

from decode_service.stream_run import Ended, StreamRun
from isthmus.types import Token


@dataclass(frozen=True, slots=True)
class JoinBatch:
    """The stream runs from the next step on. The step loop owns the run until it gives it back or reports the end."""

    run: StreamRun
    at_step: int  # steps that had been finished when this was posted


@dataclass(frozen=True, slots=True)
class LeaveBatch:
    """Ends a stream before the next step. One that has ended or left meanwhile is left alone."""

    transfer_id: str
    why: Ended


@dataclass(frozen=True, slots=True)
class HandOver:
    """Gives the stream's run back between two steps; HandedOver with the same ticket follows."""

    transfer_id: str
    ticket: int


StepCommand = JoinBatch | LeaveBatch | HandOver


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step gave one stream: tokens from `index` on, an end, or both (the tokens come first)."""

    transfer_id: str
    index: int
    tokens: Sequence[Token]
    ended: Ended | None


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The answer to HandOver, after every emission of the stream. None: the stream had ended or left before."""

    ticket: int
    run: StreamRun | None
