"""Where a request goes: pure scoring over what the pool knows, and a memory of which worker had which prefix."""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from isthmus.types import Request
from router.pool.admission import Order

NO_NEW_WORK_S = 1.0  # without progress for this long: gets nothing new
LOST_S = 3.0  # without progress for this long: its requests go elsewhere
# Twice a prefill worker's default tile budget: it stays busy, and what waits, waits here, where order still changes.
MAX_TOKENS_AHEAD = 512
STRIDE_TOKENS = 64  # prefixes are remembered at multiples of the tile
MAX_PREFIXES = 65_536
RECOVERY_WAIT_S = 30.0  # for a worker to exist, of a request that had its place: longer than a worker takes to start


@dataclass(frozen=True, slots=True)
class NumericsClass:
    """Workers of one class compute the same bits from the same cache layout; a stream never leaves its class."""

    model_digest: str
    layout_fingerprint: str
    numerics_digest: str


@dataclass(frozen=True, slots=True)
class Need:
    """What one attempt at a request needs of the workers, and how long it may wait, on the router's clock."""

    request: Request  # numerics_digest set
    numerics: NumericsClass
    order: Order
    prefixes: Sequence[bytes]  # of the prompt, for affinity
    queue_deadline: float
    deadline: float
    retention_s: int = 0  # 0: the request ends with its client
    counter: int = 0  # of the attach
    avoid: AbstractSet[str] = frozenset()  # workers that failed this request before, if there are others
    is_patient: bool = False  # it had its place and lost it: it waits longer for a worker to exist
    holds_blocks: bool = False  # others may wait for those: it waits for nobody's turn at prefill
    moves: bool = False  # another decode worker brings the blocks

    def with_patience(self, now: float) -> "Need":
        """For another try, when a worker was lost."""
        return replace(self, is_patient=True, queue_deadline=min(self.deadline, now + RECOVERY_WAIT_S))

    @property
    def num_positions(self) -> int:
        """Cache positions the request may need: the last token's own latent is never stored."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens - 1


@dataclass(frozen=True, slots=True)
class DecodeView:
    """A decode worker that takes new work."""

    incarnation: str
    numerics: NumericsClass
    block_size: int
    total_blocks: int
    reported_free_blocks: int  # up to a heartbeat old; other routers' reservations included
    reserved_blocks: int  # this router's reservations now
    num_prefix_tokens: int = 0  # of this request's prompt, probably cached there: need neither room nor transfer

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def free_blocks(self) -> int:
        """A careful guess between reports: what was reported, less if this router alone has taken more since."""
        return min(self.reported_free_blocks, self.total_blocks - self.reserved_blocks)

    @property
    def room(self) -> int:
        """Free blocks for this request, as if its cached prefix were free too."""
        return self.free_blocks + self.num_prefix_tokens // self.block_size


@dataclass(frozen=True, slots=True)
class PrefillView:
    """A prefill worker that takes new work."""

    incarnation: str
    numerics: NumericsClass
    num_tokens_ahead: int  # this router's prompts, not yet computed
    num_queued: int  # as it reported; other routers' included
    num_prefix_tokens: int = 0  # of this request's prompt, computed there before as far as this router remembers


def choose_class(decode: Sequence[DecodeView], prefill: Sequence[PrefillView]) -> NumericsClass | None:
    """For a new request: the class that has both roles and the most free blocks; None when there is none."""
    free: defaultdict[NumericsClass, int] = defaultdict(int)
    for view in decode:
        free[view.numerics] += view.free_blocks
    complete = free.keys() & {view.numerics for view in prefill}
    return max(complete, key=lambda numerics: (free[numerics], numerics.numerics_digest), default=None)


def rank_decode(views: Sequence[DecodeView], num_tokens: int, *, avoid: AbstractSet[str] = frozenset()) -> list[str]:
    """Incarnations to ask for `num_tokens` of cache: most room first, then those that seem full, then avoided ones.

    A worker that could not hold the request even when empty is left out.
    """
    able = [view for view in views if view.num_blocks(num_tokens) <= view.total_blocks]
    able.sort(key=lambda view: (view.incarnation in avoid, -view.room, view.incarnation))
    return [view.incarnation for view in able]


def choose_prefill(
    views: Sequence[PrefillView], *, avoid: AbstractSet[str] = frozenset(), holds_blocks: bool = False
) -> str | None:
    """The worker through first, a remembered prefix counted as work saved; None: all have enough ahead.

    One to avoid is taken when there is no other. Who holds blocks that others may wait for passes the limit.
    """
    best = min(
        (view for view in views if holds_blocks or view.num_tokens_ahead < MAX_TOKENS_AHEAD),
        key=lambda view: (
            view.incarnation in avoid,
            view.num_tokens_ahead - view.num_prefix_tokens,
            view.num_queued,
            view.incarnation,
        ),
        default=None,
    )
    return best.incarnation if best else None


class PrefixAffinity:
    """Which workers last had which prompt prefix, as far as this router remembers: a hint, never a promise.

    At most `max_prefixes` prefixes; the least recently used go first.
    """

    def __init__(self, max_prefixes: int = MAX_PREFIXES):
        self._max_prefixes = max_prefixes
        self._workers: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def remember(self, prefixes: Sequence[bytes], incarnations: tuple[str, ...]) -> None:
        """The prefill and the decode worker of one request."""
        for prefix in prefixes:
            self._workers[prefix] = incarnations
            self._workers.move_to_end(prefix)
        while len(self._workers) > self._max_prefixes:
            self._workers.popitem(last=False)

    def num_prefix_tokens(self, prefixes: Sequence[bytes], incarnation: str) -> int:
        """Length of the longest remembered prefix that `incarnation` had."""
        for index in range(len(prefixes), 0, -1):
            if incarnation in self._workers.get(prefixes[index - 1], ()):
                return index * STRIDE_TOKENS
        return 0
