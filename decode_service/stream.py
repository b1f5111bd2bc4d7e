"""One request on this decode worker as the event loop knows it: its record, and who has its blocks.

    FILLING --claim--> RUNNING --handed over for a move--> MOVING --acknowledged--> nothing of it is left here
       |                  ^  |                                |
       |                  +--|------ not acknowledged --------+
       +--- failed, cancelled, deadline, end of tokens -------+--> ENDED

A stream that ended is forgotten at once, or kept without blocks for those who may still ask for its tokens
(`attachment.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from decode_service.ports import OutgoingMove
from decode_service.reader import Reader
from decode_service.stream_run import Ended, StreamRun
from isthmus.kv.block_pool import BlockPool
from isthmus.ledger import Ledger
from isthmus.types import Extent, Request, Token


class Phase(Enum):
    FILLING = "filling"  # blocks are reserved; the receiver may write them
    RUNNING = "running"  # claimed: the step loop owns the run and its blocks
    MOVING = "moving"  # out of the step loop; the sender reads the blocks
    ENDED = "ended"


_NEXT_PHASES = {
    Phase.FILLING: {Phase.RUNNING, Phase.ENDED},
    Phase.RUNNING: {Phase.MOVING, Phase.ENDED},
    Phase.MOVING: {Phase.RUNNING, Phase.ENDED},
    Phase.ENDED: set(),
}


@dataclass(eq=False, slots=True)
class ServedStream:
    """Written in the event loop alone, through the methods. `reader` says who reads it.

    `tokens` are those that the claim brought and that the step loop has delivered since: what the step loop computes
    at this moment is not in it. Emitted tokens that a request brings come in as they are replayed, with their logprobs.
    """

    request: Request
    reader: Reader
    transfer_id: str
    num_cached_tokens: int  # prompt prefix that was here already
    missing: tuple[Extent, ...]  # what the present attempt has to send
    run: StreamRun | None  # None while the step loop has it, and after the end
    attempt: int = field(default=1, init=False)
    phase: Phase = field(default=Phase.FILLING, init=False)
    tokens: list[Token] = field(default_factory=list[Token], init=False)
    num_claimed: int = field(default=0, init=False)  # tokens that the commit brought
    joined_at: float = field(default=0.0, init=False)  # when the step loop was last given the run; seconds
    ending: Ended | None = field(default=None, init=False)  # asked for; the step loop may still have the run
    ended: Ended | None = field(default=None, init=False)  # reported
    outgoing: OutgoingMove | None = field(default=None, init=False)  # while MOVING

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Tokens in the record or known from the request."""
        return max(len(self.tokens), len(self.request.emitted_token_ids))

    def rearm(self, attempt: int, missing: tuple[Extent, ...]) -> None:
        """Another writer fills what is missing."""
        self.attempt = attempt
        self.missing = missing

    def claim(self, tokens: Sequence[Token]) -> Ended | None:
        """Every row is there, and these tokens; why the stream ends with them, if it does."""
        assert self.run is not None, "a stream that fills has its run"
        self._enter(Phase.RUNNING)
        begun = self.run.begin(tokens, self.attempt)
        self.tokens.extend(begun.tokens)
        self.num_claimed = len(self.tokens)
        return begun.ended

    def give_run(self, now: float) -> StreamRun:
        """The step loop has the run from now on."""
        run = self.run
        assert run is not None, "the step loop has it already"
        if self.phase is Phase.MOVING:
            self._enter(Phase.RUNNING)
        self.run = None
        self.joined_at = now
        return run

    def take_back(self, run: StreamRun) -> None:
        """The step loop gave the run up between two steps, for a move."""
        self._enter(Phase.MOVING)
        self.run = run

    def send_by(self, outgoing: OutgoingMove | None) -> None:
        """The transfer that takes the stream away; None: it is over."""
        self.outgoing = outgoing

    def record(self, index: int, tokens: Sequence[Token]) -> None:
        """The step loop delivers these tokens, the first of them at `index`."""
        assert index == len(self.tokens), "emissions come in order, without a gap"
        self.tokens.extend(tokens)

    def ask_end(self, why: Ended) -> None:
        self.ending = why

    def end(self, why: Ended | None, pool: BlockPool) -> None:
        """It ends, with its blocks if they are here. `why` is what is reported; None: nobody is told."""
        self._enter(Phase.ENDED)
        self.ended = why
        run = self.run
        self.run = None
        if run is not None:
            run.free(pool)

    def note(self, ledger: Ledger, event: str, cause: str = "", **fields: object) -> None:
        ledger.record(
            event,
            request_id=self.request_id,
            transfer_id=self.transfer_id,
            attempt=self.attempt,
            cause=cause,
            **fields,
        )

    def _enter(self, phase: Phase) -> None:
        assert phase in _NEXT_PHASES[self.phase], f"{self.phase.value} cannot become {phase.value}"
        self.phase = phase
