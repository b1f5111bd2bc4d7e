"""One prompt on this prefill worker: what is computed, where it goes, and who waits for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from isthmus.errors import IsthmusError
from isthmus.types import Request, TransferTarget
from isthmus.v1 import prefill_pb2
from kv_transfer.outgoing import OutgoingTransfer

Event = prefill_pb2.PrefillResponse | IsthmusError


@dataclass(eq=False, slots=True)
class Sequence:
    """Owner: the step loop. `is_cancelled` may be set by any thread and is read between layers."""

    request: Request
    target: TransferTarget | None  # None: the request ends at token 0, nothing is sent
    emit: Callable[[Event], None]  # thread-safe; an IsthmusError ends the call
    deadline: float | None  # on the worker's clock
    is_cancelled: bool = False
    block_table: list[int] = field(default_factory=list[int])
    num_cached_tokens: int = 0
    num_computed_tokens: int = 0  # cached ones included
    transfer: OutgoingTransfer | None = None
    first_tile_ns: int = 0  # when the first tile began; 0: not yet
    last_tile_ns: int = 0  # when the last tile ended

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    def must_stop(self, now: float) -> bool:
        return self.is_cancelled or (self.deadline is not None and self.deadline <= now)

    @property
    def prefill_ms(self) -> float:
        return (self.last_tile_ns - self.first_tile_ns) / 1e6


class Chunk(NamedTuple):
    """Positions [start, start + num_tokens) of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    num_tokens: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.sequence.request.prompt_token_ids[self.start : self.start + self.num_tokens]

    @property
    def ends_prompt(self) -> bool:
        return self.start + self.num_tokens == self.sequence.num_prompt_tokens
