"""One request on this decode worker: its record, its blocks and who may touch them.

    FILLING --claim--> RUNNING --Move, after the step--> MOVING --acknowledged--> gone from here
       |                  ^  |                             |
       |                  |  |  <------ not acknowledged --+
       +---- failed, cancelled, deadline, end of tokens ---+--> ENDED

A stream that ended is forgotten at once, or kept without blocks for those who may still ask for its tokens
(`attachment.py`, where it is also written who reads a stream).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from google.protobuf.message import Message

from isthmus.errors import DataLoss
from isthmus.kv.block_pool import BlockPool
from isthmus.ledger import Ledger
from isthmus.steps import FromPrevious, SamplingInput, StepRow
from isthmus.text.finish import finish_reason
from isthmus.types import Extent, FinishReason, Request, Token
from kv_transfer.outgoing import OutgoingTransfer


class Phase(Enum):
    FILLING = "filling"  # blocks are set aside; the receiver may write them
    RUNNING = "running"  # claimed: the step loop owns the blocks
    MOVING = "moving"  # out of the step loop; the sender reads the blocks
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class AttachKey:
    """Fences routers: the higher counter wins."""

    router_incarnation: str
    counter: int

    def is_stale(self, held: "AttachKey") -> bool:
        """Whether a message with this key comes from a router that no longer has the stream held by `held`."""
        return self.counter < held.counter or (self.counter == held.counter and self != held)


class TokenSink(Protocol):
    """Where a stream's messages go: the session of the router it is attached to, alive or lost."""

    def send(self, message: Message) -> None: ...


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a stream ended; `reason` and `detail` explain FinishReason.ERROR."""

    finish_reason: FinishReason
    reason: str = ""
    detail: str = ""


Row = tuple[StepRow, SamplingInput]


class UnderWay(NamedTuple):
    """What a pending step computes for a stream: so many tokens, the last of them from this row."""

    num_tokens: int
    last: FromPrevious


@dataclass(eq=False, slots=True)
class Stream:
    """Owner: the step loop while RUNNING, otherwise the event loop. `blocks` are freed by the owner, once.

    Of the emitted tokens a request brings, those that the claim did not bring are replayed: computed again by the
    decode path, compared, and recorded with their logprobs. `num_sent` keeps them from being sent again.
    """

    request: Request
    attach: AttachKey
    sink: TokenSink
    retention_s: float | None  # how long it lives without a session, finished or not; None: on_disconnect is abort
    transfer_id: str
    attempt: int
    block_table: list[int]  # prompt blocks at first, all of a moved stream; grows from `num_set_aside`
    num_set_aside: int
    num_cached_tokens: int  # prompt prefix that was here already
    missing: tuple[Extent, ...]  # what the present attempt has to send
    deadline: float | None  # on the worker's clock
    phase: Phase = Phase.FILLING
    tokens: list[Token] = field(default_factory=list[Token])
    token_ids: list[int] = field(default_factory=list[int])
    num_sent: int = 0  # tokens below this index the sink has, or is being sent
    keep_until: float | None = None  # on the worker's clock; set while it has no session, or has ended
    ending: Ended | None = None  # asked for while the step loop had it
    ended: Ended | None = None  # reported
    outgoing: OutgoingTransfer | None = None  # while MOVING
    num_claimed: int = 0  # tokens that the commit brought
    joined_at: float = 0.0  # the step loop, on the worker's clock
    joined_at_step: int = 0

    def __post_init__(self) -> None:
        self.num_sent = len(self.request.emitted_token_ids)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens computed here or known from the request."""
        return max(len(self.tokens), len(self.request.emitted_token_ids))

    def note(self, ledger: Ledger, event: str, cause: str = "", **fields: object) -> None:
        ids = self.request_id, self.transfer_id
        ledger.record(event, request_id=ids[0], transfer_id=ids[1], attempt=self.attempt, cause=cause, **fields)

    def rows(self, max_replayed: int, under_way: UnderWay | None = None) -> list[Row]:
        """What the next step computes: the token after all so far, and after up to `max_replayed` more emitted ones."""
        num_done = len(self.token_ids) + (under_way.num_tokens if under_way else 0)
        emitted = self.request.emitted_token_ids
        if num_done > len(emitted):
            return [self._row(under_way.last if under_way else self.token_ids[-1], num_done, self.token_ids)]
        last = min(len(emitted), num_done + max_replayed)
        return [self._row(emitted[n - 1], n, emitted[:n]) for n in range(num_done, last + 1)]

    def _row(self, token: int | FromPrevious, num_tokens: int, known: Sequence[int]) -> Row:
        """Computes the last of `num_tokens`, and so the next one's logits."""
        row = StepRow(token, self.num_prompt_tokens + num_tokens - 1, self.block_table)
        return row, SamplingInput(self.request, known)

    def accept(self, token: Token, context_length: int) -> Ended | None:
        """The next token, by the commit or a step; why the stream ends with it, or before it when it cannot be."""
        index, emitted = len(self.token_ids), self.request.emitted_token_ids
        is_replayed = index < len(emitted)
        if is_replayed and token.id != emitted[index]:
            return _mismatch(f"token {index} was emitted as {emitted[index]} and is {token.id} now")
        self.tokens.append(token)
        self.token_ids.append(token.id)
        reason = finish_reason(self.request, self.token_ids, context_length)
        if reason and is_replayed:
            return _mismatch(f"the emitted tokens go on to {len(emitted)}, but token {index} ends the request")
        return Ended(reason) if reason else None

    def grow(self, pool: BlockPool, num_positions: int) -> None:
        """Makes room for the next rows, out of what the reservation set aside: it cannot fail."""
        num_blocks = -(-num_positions // pool.block_size) - len(self.block_table)
        if num_blocks > 0:
            assert num_blocks <= self.num_set_aside, "a reservation covers prompt and max_tokens"
            self.block_table += pool.allocate(num_blocks, from_set_aside=True)
            self.num_set_aside -= num_blocks

    def free(self, pool: BlockPool) -> None:
        """Gives every block back. Only the owner calls it; a second call finds nothing left."""
        self.phase = Phase.ENDED
        blocks, self.block_table = self.block_table, []
        set_aside, self.num_set_aside = self.num_set_aside, 0
        pool.release(blocks)
        pool.give_up(set_aside)


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step gave one stream: tokens from `index` on, an end, or both (the tokens come first)."""

    stream: Stream
    index: int
    tokens: Sequence[Token]
    ended: Ended | None


def _mismatch(detail: str) -> Ended:
    return Ended(FinishReason.ERROR, DataLoss.reason, detail)
