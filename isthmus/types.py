"""Values every service shares: what a request asks, what a token is. No behaviour, no torch."""

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the end of the context
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; ranges are checked once, at the router (`router/validate.py`)."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0: argmax, ties to the lower id
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the token's own and the top k
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """A request as workers see it: tokenised, validated, seeded. Generation is a pure function of it."""

    request_id: str  # UUIDv7 minted by the router
    seed: int  # uint64
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    emitted_token_ids: tuple[int, ...] = ()
    numerics_digest: str = ""
    timeout_s: float | None = None  # a span, counted from receipt
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token; logprobs are of the raw logits in fp32, only when asked for."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (id, logprob), best first


Place = tuple[str, int]  # (name of the plane, layer)


@dataclass(frozen=True, slots=True)
class Extent:
    """Positions [first_token, first_token + num_tokens) of one plane and layer.

    Only on the wire does a plane have a number: `isthmus.kv.layout.KvLayout.number_of`.
    """

    plane: str
    layer: int
    first_token: int
    num_tokens: int

    @property
    def place(self) -> Place:
        return self.plane, self.layer

    @property
    def end(self) -> int:
        return self.first_token + self.num_tokens


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """total = free + referenced; cached and draining are subsets of free and referenced."""

    total: int
    free: int  # nobody references them; cached ones included
    cached: int  # of the free ones: reusable by content
    referenced: int
    draining: int = 0  # of the referenced ones: an unacknowledged send still reads them


@dataclass(frozen=True, slots=True)
class TransferTarget:
    """Where a prefill worker sends blocks; every field comes from the decode worker's reservation."""

    transfer_id: str  # 32 hex digits
    attempt: int
    zmq_endpoint: str
    receiver_incarnation: str  # 32 hex digits
    layout_fingerprint: str
    missing: tuple[Extent, ...] = field(default=())
