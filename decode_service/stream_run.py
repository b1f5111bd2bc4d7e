"""A stream as the step loop computes it: its blocks, and the ids of its tokens so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from isthmus.errors import DataLoss, NonFiniteLogits
from isthmus.kv.block_pool import BlockPool
from isthmus.ledger import Ledger
from isthmus.steps import StepResult, needs_its_tokens
from isthmus.text.finish import finish_reason
from isthmus.types import FinishReason, Request, Token


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a stream ended; `reason` and `detail` explain FinishReason.ERROR."""

    finish_reason: FinishReason
    reason: str = ""
    detail: str = ""


class Settled(NamedTuple):
    """What results gave a stream: tokens that it keeps, an end, or both (the tokens come first)."""

    tokens: Sequence[Token]
    ended: Ended | None


@dataclass(eq=False, slots=True)
class StreamRun:
    """Has one owner at a time, and only the owner reads or calls it.

    The event loop makes it with the reservation and gives it to the step loop with JoinBatch. The step loop gives it
    back with HandedOver, or frees it and reports the end.

    Of the emitted tokens a request brings, those that the claim did not bring are replayed: computed again by the
    decode path and compared.
    """

    request: Request
    transfer_id: str
    context_length: int
    deadline: float | None  # seconds, on the worker's clock
    block_table: list[int]  # the prompt's blocks at first, all blocks of a moved stream; grows from `num_set_aside`
    num_set_aside: int  # blocks promised beyond those in the table
    attempt: int = 1  # of the transfer that was claimed
    token_ids: list[int] = field(default_factory=list[int], init=False)
    is_freed: bool = field(default=False, init=False)
    num_prompt_tokens: int = field(init=False)
    needs_its_tokens: bool = field(init=False)  # the host has to know each token before the next is sampled

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        self.needs_its_tokens = needs_its_tokens(self.request.sampling)

    def begin(self, tokens: Sequence[Token], attempt: int) -> Settled:
        """The claim brought these tokens, from token 0 on, by this attempt."""
        self.attempt = attempt
        return self.accept_all(tokens)

    def accept_all(self, results: Sequence[StepResult]) -> Settled:
        """Results for the next token and those after it. What follows an end is dropped."""
        tokens: list[Token] = []
        for result in results:
            if isinstance(result, NonFiniteLogits):
                return Settled(tokens, Ended(FinishReason.ERROR, result.reason, result.detail))
            num_before = len(self.token_ids)
            ended = self._accept(result)
            if len(self.token_ids) > num_before:
                tokens.append(result)
            if ended is not None:
                return Settled(tokens, ended)
        return Settled(tokens, None)

    def grow(self, pool: BlockPool, num_positions: int) -> None:
        """Makes room for the next rows, out of what the reservation set aside: it cannot fail."""
        num_blocks = -(-num_positions // pool.block_size) - len(self.block_table)
        if num_blocks > 0:
            assert num_blocks <= self.num_set_aside, "a reservation covers prompt and max_tokens"
            self.block_table += pool.allocate(num_blocks, from_set_aside=True)
            self.num_set_aside -= num_blocks

    def free(self, pool: BlockPool) -> None:
        """Gives every block back; a second call finds nothing left."""
        self.is_freed = True
        blocks = self.block_table
        self.block_table = []
        num_set_aside = self.num_set_aside
        self.num_set_aside = 0
        pool.release(blocks)
        pool.give_up(num_set_aside)

    def note_joined(self, ledger: Ledger, steps_waited: int) -> None:
        ledger.record(
            "stream.joined",
            request_id=self.request.request_id,
            transfer_id=self.transfer_id,
            attempt=self.attempt,
            steps_waited=steps_waited,
        )

    def _accept(self, token: Token) -> Ended | None:
        """The next token; why the stream ends with it, or before it when the token cannot be."""
        index = len(self.token_ids)
        emitted = self.request.emitted_token_ids
        is_replayed = index < len(emitted)
        if is_replayed and token.id != emitted[index]:
            return _mismatch(f"token {index} was emitted as {emitted[index]} and is {token.id} now")
        self.token_ids.append(token.id)
        reason = finish_reason(self.request, self.token_ids, self.context_length)
        if reason is None:
            return None
        if is_replayed:
            return _mismatch(f"the emitted tokens go on to {len(emitted)}, but token {index} ends the request")
        return Ended(reason)


def _mismatch(detail: str) -> Ended:
    return Ended(FinishReason.ERROR, DataLoss.reason, detail)
