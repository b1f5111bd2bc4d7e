"""Which router is asked next, how long to wait before that, and when to give up. No I/O; the time is passed in."""

from isthmus.client.failure import CallFailure, FailureKind
from isthmus.client.router_list import RouterAddress, RouterList
from isthmus.errors import DeadlinePassed, Draining, IsthmusError, WorkersUnavailable
from isthmus.ids import Ids

MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 0.5
SUSPECT_S = 2.0  # a router that failed is asked last for so long
MAX_REFUSALS = 10  # of one request
ROUTER_TIMEOUT_S = 30.0


class Retries:
    """The calls of one request, one after another. Written by the GenerationLife or QuestionLife that makes them."""

    def __init__(self, routers: RouterList, ids: Ids, *, now: float, timeout_s: float, router_timeout_s: float):
        """The request may take `timeout_s` from `now`, and `router_timeout_s` until a router takes it."""
        self._routers = routers
        self._ids = ids
        self._deadline = now + timeout_s
        self._router_timeout_s = router_timeout_s
        self._away_since: float | None = None
        self._not_before: dict[RouterAddress, float] = {}
        self._num_refusals = 0
        self._backoff_s = MIN_BACKOFF_S
        self.router = routers.pick(now, {})
        routers.budget.deposit()

    @property
    def addresses(self) -> list[str]:
        """Every router's address, beginning with the one that was chosen last."""
        all_addresses = [router.address for router in self._routers.all]
        return list(dict.fromkeys([self.router.address, *all_addresses]))

    def remaining_s(self, now: float) -> float:
        """How long the next call may take. Raises DeadlinePassed."""
        remaining_s = self._deadline - now
        if remaining_s <= 0:
            raise DeadlinePassed("the deadline passed")
        return remaining_s

    def progressed(self) -> None:
        """The request made progress: the next failure is the first of a new row."""
        self._backoff_s = MIN_BACKOFF_S
        self._away_since = None

    def failed(self, failure: CallFailure, now: float) -> float:
        """The seconds to wait before `router` is asked, after a call that failed. Raises what ends the request."""
        match failure.kind:
            case FailureKind.BROKEN:
                return self.broken(failure, now, may_give_up=True)
            case FailureKind.REFUSED:
                return self.refused(failure, now)
            case _:
                raise failure.error

    def broken(self, failure: CallFailure, now: float, *, may_give_up: bool) -> float:
        """As `failed`, for a lost connection, router or worker: repeated until the deadline.

        With `may_give_up`, for a request that no router ever took, only for the router timeout.
        """
        error = failure.error
        if failure.is_connection_lost or isinstance(error, Draining):
            self.router.suspect(now + SUSPECT_S)
        if self._away_since is None:
            self._away_since = now
        if may_give_up and now - self._away_since > self._router_timeout_s:
            raise WorkersUnavailable(f"no router answers at {self._routers.names}: {error.detail}") from error
        delay_s = self._choose_next(error, now)
        if now + delay_s >= self._deadline:
            raise DeadlinePassed(f"the deadline passed without a router: {error.detail}") from error
        return delay_s

    def refused(self, failure: CallFailure, now: float) -> float:
        """As `failed`, for a refusal: repeated as the budget and the deadline allow, else the refusal is raised."""
        error = failure.error
        if isinstance(error, WorkersUnavailable):  # another router may see workers that this one does not
            self.router.suspect(now + min(SUSPECT_S, error.retry_after_s or 0.0))
        self._num_refusals += 1
        if self._num_refusals > MAX_REFUSALS or not self._routers.budget.withdraw():
            raise error
        delay_s = self._choose_next(error, now)
        if now + delay_s >= self._deadline:
            raise error
        return delay_s

    def _choose_next(self, error: IsthmusError, now: float) -> float:
        """The wait grows with every failure, and half of it is left to chance, so that clients do not come together."""
        if error.retry_after_s is not None:
            self._not_before[self.router] = now + error.retry_after_s
        self.router = self._routers.pick(now, self._not_before)
        spread = 0.5 + 0.5 * self._ids.fraction()
        backoff_s = self._backoff_s * spread
        self._backoff_s = min(MAX_BACKOFF_S, 2 * self._backoff_s)
        return max(backoff_s, self._not_before.get(self.router, now) - now)
