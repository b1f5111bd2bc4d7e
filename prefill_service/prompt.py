"""One prompt on this prefill worker: what is computed, where it goes, and who waits for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from isthmus.errors import IsthmusError
from isthmus.types import Request, TransferTarget
from isthmus.v1 import prefill_pb2
from prefill_service.ports import PromptTransfer

Event = prefill_pb2.PrefillResponse | IsthmusError


@dataclass(eq=False, slots=True)
class Prompt:
    """Owned by the prefill loop, which alone calls the methods that change it, but for `cancel`.

    `cancel` is the submitter's, from any thread: it is seen between two layers of a step under way, sooner than any
    command could be. All times are seconds on the worker's clock.
    """

    request: Request
    target: TransferTarget | None  # None: the request ends at token 0, nothing is sent
    emit: Callable[[Event], None]  # takes events from any thread; an IsthmusError is the last one
    deadline: float | None
    is_cancelled: bool = False
    block_table: list[int] = field(default_factory=list[int])
    num_cached_tokens: int = 0  # found in this worker's cache
    num_computed_tokens: int = 0  # cached ones included
    transfer: PromptTransfer | None = None
    first_tile_at: float | None = None  # when its first tile began
    last_tile_at: float = 0.0  # when its last tile ended

    def cancel(self) -> None:
        """Nobody waits for it any more. It ends between two layers, or at the loop's next turn."""
        self.is_cancelled = True

    def must_stop(self, now: float) -> bool:
        return self.is_cancelled or (self.deadline is not None and self.deadline <= now)

    def take_blocks(self, block_table: list[int], num_cached_tokens: int) -> None:
        """Room for the whole prompt, of which so many tokens need no computing."""
        self.block_table = block_table
        self.num_cached_tokens = num_cached_tokens
        self.num_computed_tokens = num_cached_tokens

    def give_back_blocks(self) -> list[int]:
        """For whoever releases them: it has none afterwards."""
        blocks = self.block_table
        self.block_table = []
        return blocks

    def send_by(self, transfer: PromptTransfer) -> None:
        self.transfer = transfer

    def begin_tile(self, now: float) -> bool:
        """True: it is the prompt's first."""
        if self.first_tile_at is not None:
            return False
        self.first_tile_at = now
        return True

    def end_tile(self, num_tokens: int, now: float) -> None:
        """So many tokens more are computed and stored."""
        self.num_computed_tokens += num_tokens
        self.last_tile_at = now

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def prefill_ms(self) -> float:
        """From the beginning of the first tile to the end of the last."""
        return 0.0 if self.first_tile_at is None else 1000 * (self.last_tile_at - self.first_tile_at)


class PromptChunk(NamedTuple):
    """Positions [start, start + num_tokens) of a prompt, computed in one step."""

    prompt: Prompt
    start: int
    num_tokens: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt.request.prompt_token_ids[self.start : self.start + self.num_tokens]

    @property
    def ends_prompt(self) -> bool:
        return self.start + self.num_tokens == self.prompt.num_prompt_tokens
