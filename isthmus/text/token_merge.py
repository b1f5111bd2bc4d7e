"""One stream from two sources: prefill sends token 0, decode sends every token, and each is delivered once. Pure."""

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from isthmus.errors import DataLoss

TokenT = TypeVar("TokenT")


class TokenMerge(Generic[TokenT]):
    """Delivers each index once, in order, from whichever copy comes first.

    Written by whoever delivers the stream. A later copy must equal the delivered one, since generation is a pure
    function: a copy that differs, or an index beyond `max_tokens`, raises DataLoss. Copies of a second attempt go
    through the same merge, so a retry repeats nothing. Tokens that an earlier call delivered are known by their ids.
    """

    def __init__(self, max_tokens: int, id_of: Callable[[TokenT], int], identity: Callable[[TokenT], Hashable]):
        """`identity` is what copies are compared by, and all that is kept of a delivered token."""
        self._max_tokens = max_tokens
        self._id_of = id_of
        self._identity = identity
        self._known_ids: list[int] = []
        self._delivered: list[Hashable] = []  # behind the known ones
        self._ahead: dict[int, TokenT] = {}  # came before a lower index did; at most max_tokens

    def know(self, token_id: int) -> None:
        """The next index was delivered by an earlier call."""
        assert not self._delivered, "what is known comes first"
        self._known_ids.append(token_id)

    @property
    def next_index(self) -> int:
        return len(self._known_ids) + len(self._delivered)

    def add(self, index: int, tokens: Sequence[TokenT]) -> list[TokenT]:
        """Takes tokens [index, index + len(tokens)) of one source; returns those that may be delivered now."""
        if index + len(tokens) > self._max_tokens:
            raise DataLoss(
                f"token index {index + len(tokens) - 1} is beyond the {self._max_tokens} the request may have"
            )
        for position, token in enumerate(tokens, start=index):
            self._check_copy(position, token)
            if position >= self.next_index:
                self._ahead[position] = token
        fresh: list[TokenT] = []
        while (token := self._ahead.pop(self.next_index, None)) is not None:
            self._delivered.append(self._identity(token))
            fresh.append(token)
        return fresh

    def _check_copy(self, index: int, token: TokenT) -> None:
        num_known = len(self._known_ids)
        if index < num_known:
            is_same = self._known_ids[index] == self._id_of(token)
        elif index < self.next_index:
            is_same = self._delivered[index - num_known] == self._identity(token)
        else:
            waiting = self._ahead.get(index)
            is_same = waiting is None or self._identity(waiting) == self._identity(token)
        if not is_same:
            raise DataLoss(f"two copies of token {index} differ")
