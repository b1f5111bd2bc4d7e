"""Text as a pure function of the tokens: no broken character, no change to released text, stop strings cut off."""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Released:
    """Text that became certain. After `stopped` nothing more comes."""

    text: str
    stopped: bool


class Detokenizer:
    """One stream's text. Holds back bytes of an unfinished character and text that may still become a stop string."""

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = (), *, include_stop: bool = False):
        self._vocabulary = vocabulary
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_next = vocabulary.strips_leading_space
        self._matcher = StopMatcher(stop) if stop else None
        self._include_stop = include_stop
        self._held = ""
        self._stopped = False

    def push(self, token_id: int) -> Released:
        """One more token, in order. A call after the stop releases nothing."""
        token_bytes = self._vocabulary.bytes_of(token_id)
        if self._stopped or not token_bytes:
            return Released("", self._stopped)
        return self._release(self._characters.decode(token_bytes))

    def finish(self) -> str:
        """What was held back, once no token follows; an unfinished character becomes U+FFFD."""
        if self._stopped:
            return ""
        released = self._release(self._characters.decode(b"", final=True))
        held, self._held = self._held, ""
        return released.text if released.stopped else released.text + held

    def _release(self, text: str) -> Released:
        if self._strips_next and text:
            text, self._strips_next = text.removeprefix(" "), False
        if self._matcher is None:
            return Released(text, stopped=False)
        pending = self._held + text
        end = self._matcher.feed(text)
        if end is not None:
            self._stopped, self._held = True, ""
            end += len(pending) - len(text)
            return Released(pending[: end if self._include_stop else end - self._matcher.num_matched], stopped=True)
        certain = len(pending) - self._matcher.num_held
        self._held = pending[certain:]
        return Released(pending[:certain], stopped=False)


class StopMatcher:
    """Finds the first completed stop string in text that comes in pieces (Aho and Corasick, 1975).

    The state is the longest end of the text that begins a stop string, so `num_held` is exactly what must be held back.
    Of stop strings that complete at the same character the longest counts.
    """

    def __init__(self, stop: Sequence[str]):
        assert all(stop), "an empty stop string would match everywhere"
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._matched = [0]  # length of the longest stop string that ends in this state
        for text in stop:
            self._add(text)
        self._fallback = [0] * len(self._next)
        self._link()
        self._state = 0

    @property
    def num_held(self) -> int:
        return self._depth[self._state]

    @property
    def num_matched(self) -> int:
        return self._matched[self._state]

    def feed(self, text: str) -> int | None:
        """How many characters of `text` complete a stop string, or None."""
        for count, character in enumerate(text, 1):
            self._state = self._step(self._state, character)
            if self._matched[self._state]:
                return count
        return None

    def _add(self, text: str) -> None:
        state = 0
        for character in text:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._matched.append(0)
            state = self._next[state][character]
        self._matched[state] = len(text)

    def _link(self) -> None:
        """Breadth first: a state falls back to the longest proper end of itself that also begins a stop string."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self._step(self._fallback[state], character)
                waiting.append(child)
            self._matched[state] = self._matched[state] or self._matched[self._fallback[state]]

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)
