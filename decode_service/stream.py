"""One request on this decode worker: its record, its blocks and who may touch them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from isthmus.engine.block_pool import BlockPool
from isthmus.types import Extent, FinishReason, Request, Token
from isthmus.v1 import decode_pb2


class Phase(Enum):
    FILLING = "filling"  # blocks are set aside; the receiver may write them
    RUNNING = "running"  # claimed: the step loop owns the blocks
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class AttachKey:
    """Fences routers: a message with a lower counter is stale."""

    router_incarnation: str
    counter: int


class TokenSink(Protocol):
    """Where a stream's messages go: the session of the router it is attached to."""

    def send(self, message: decode_pb2.SessionResponse) -> None: ...


@dataclass(eq=False, slots=True)
class Stream:
    """Owner: the event loop while FILLING, the step loop while RUNNING. `blocks` are freed by the owner, once."""

    request: Request
    attach: AttachKey
    sink: TokenSink
    transfer_id: str
    attempt: int
    block_table: list[int]  # prompt blocks at first; grows from `num_set_aside`
    num_set_aside: int
    num_cached_tokens: int  # prompt prefix that was here already
    missing: tuple[Extent, ...]  # what prefill has to send
    deadline: float | None  # on the worker's clock
    phase: Phase = Phase.FILLING
    tokens: list[Token] = field(default_factory=list[Token])
    token_ids: list[int] = field(default_factory=list[int])

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def next_position(self) -> int:
        """Where the newest token's latent goes in the next step."""
        return len(self.request.prompt_token_ids) + len(self.token_ids) - 1

    def append(self, token: Token) -> None:
        self.tokens.append(token)
        self.token_ids.append(token.id)

    def grow(self, pool: BlockPool) -> None:
        """Makes room for `next_position`, out of what the reservation set aside: it cannot fail."""
        if self.next_position < len(self.block_table) * pool.block_size:
            return
        assert self.num_set_aside > 0, "a reservation covers prompt and max_tokens"
        self.block_table += pool.allocate(1, from_set_aside=True)
        self.num_set_aside -= 1

    def free(self, pool: BlockPool) -> None:
        """Gives every block back. Only the owner calls it; a second call finds nothing left."""
        self.phase = Phase.ENDED
        blocks, self.block_table = self.block_table, []
        set_aside, self.num_set_aside = self.num_set_aside, 0
        pool.release(blocks)
        pool.give_up(set_aside)


@dataclass(frozen=True, slots=True)
class Ended:
    """Why a stream ended; `reason` and `detail` explain FinishReason.ERROR."""

    finish_reason: FinishReason
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Emission:
    """What one step gave one stream: a token, an end, or both (the token comes first)."""

    stream: Stream
    index: int
    token: Token | None
    ended: Ended | None
