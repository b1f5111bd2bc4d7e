"""The routers that a client was given, and the retry budget that its requests share. No I/O; the time is passed in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class RetryBudget:
    """Bounds how many refused requests are sent again: 10 % of all requests, and a burst.

    Written by the requests of one client, one at a time: see ClientCore.
    """

    CAPACITY = 50.0
    PER_REQUEST = 0.1

    def __init__(self) -> None:
        self._tokens = self.CAPACITY

    def deposit(self) -> None:
        """Counts one new request."""
        self._tokens = min(self.CAPACITY, self._tokens + self.PER_REQUEST)

    def withdraw(self) -> bool:
        """Pays for one repetition; False, and nothing is paid, when the budget is used up."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


@dataclass(eq=False, slots=True)
class RouterAddress:
    """One router, and until when it is asked last because it failed. Written by the requests of one client."""

    address: str
    suspect_until: float = -math.inf

    def suspect(self, until: float) -> None:
        """Makes other routers preferred until then."""
        self.suspect_until = until


class RouterList:
    """Chooses the router of a call: they take turns, and those that failed lately come last.

    Written by the requests of one client, one at a time: see ClientCore.
    """

    def __init__(self, addresses: str | Sequence[str]):
        """`addresses`: host:port each, a sequence or separated by commas. Raises ValueError when there is none."""
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        unique = dict.fromkeys(item.strip() for item in given)
        self.all = [RouterAddress(address) for address in unique if address]
        if not self.all:
            raise ValueError("no router address")
        self.budget = RetryBudget()
        self._turn = -1

    @property
    def names(self) -> str:
        """All addresses, for messages."""
        return ", ".join(router.address for router in self.all)

    def pick(self, now: float, not_before: Mapping[RouterAddress, float]) -> RouterAddress:
        """The router for the next call. `not_before`: the moments that routers asked this request to wait for."""
        self._turn = (self._turn + 1) % len(self.all)
        rotated = self.all[self._turn :] + self.all[: self._turn]
        return min(rotated, key=lambda router: (router.suspect_until > now, not_before.get(router, now) - now))
