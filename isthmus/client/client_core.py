"""What the two clients share: routers, retry budget, and the lives of requests. No I/O; the time is passed in."""

from collections.abc import Mapping, Sequence
from typing import Any

from isthmus.client.generation_life import GenerationLife
from isthmus.client.options import DEFAULT_TIMEOUT_S, request_of
from isthmus.client.question import QUESTION_TIMEOUT_S, Question, QuestionLife
from isthmus.client.retries import Retries
from isthmus.client.router_list import RouterList
from isthmus.ids import Ids


class ClientCore:
    """Begins the requests of one client. Written by its client.

    The lives it begins share the routers and the budget: a client that is used by several threads lets one of them at
    a time into this object or into any of those lives.
    """

    def __init__(self, routers: str | Sequence[str], ids: Ids, *, router_timeout_s: float):
        """Raises ValueError when no router is named."""
        self.routers = RouterList(routers)
        self._ids = ids
        self._router_timeout_s = router_timeout_s

    def generation(self, prompt: str | None, options: Mapping[str, Any], now: float) -> GenerationLife:
        """A new generation; `options` are GenerateOptions. Raises InvalidRequest, TypeError for an unknown option."""
        timeout_s = options.get("timeout_s", DEFAULT_TIMEOUT_S)
        request = request_of(prompt, options, seed=self._ids.seed())
        return GenerationLife(request, self._retries(now, timeout_s))

    def question(self, question: Question[Any], now: float) -> QuestionLife:
        """A new question."""
        return QuestionLife(question.method, question.message, self._retries(now, QUESTION_TIMEOUT_S))

    def _retries(self, now: float, timeout_s: float) -> Retries:
        return Retries(self.routers, self._ids, now=now, timeout_s=timeout_s, router_timeout_s=self._router_timeout_s)
