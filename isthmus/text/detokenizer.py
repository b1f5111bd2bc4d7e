"""Text as a pure function of the tokens: no broken character, no change to released text, stop strings cut off."""

import codecs
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Released:
    """Text that no later token can change."""

    text: str
    stopped: bool  # a stop string was found: nothing more comes


class Detokenizer:
    """The text of one stream's tokens. Written by whoever delivers that stream.

    It holds back the bytes of an unfinished character, and text that may still become a stop string. `stop`: strings
    that end the text, none of them empty; they are cut off unless `include_stop`.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = (), *, include_stop: bool = False):
        assert all(stop), "an empty stop string would match everywhere"
        self._vocabulary = vocabulary
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_next = vocabulary.strips_leading_space
        self._stop = sorted(stop)
        self._include_stop = include_stop
        self._held = ""  # the longest end of the text that begins a stop string
        self._stopped = False

    def push(self, token_id: int) -> Released:
        """The text that the next token releases; after a stop string nothing is released."""
        token_bytes = self._vocabulary.bytes_of(token_id)
        if self._stopped or not token_bytes:
            return Released("", self._stopped)
        return self._release(self._characters.decode(token_bytes))

    def finish(self) -> str:
        """The text that was held back, once no token follows; an unfinished character becomes U+FFFD."""
        if self._stopped:
            return ""
        released = self._release(self._characters.decode(b"", final=True))
        held = self._held
        self._held = ""
        return released.text if released.stopped else released.text + held

    def _release(self, text: str) -> Released:
        if self._strips_next and text:
            text = text.removeprefix(" ")
            self._strips_next = False
        text = self._held + text
        # Of several stop strings the one that ends first counts; of those that end together, the longest.
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self._stopped = True
            self._held = ""
            return Released(text[: end if self._include_stop else start], stopped=True)
        certain = len(text) - self._num_held(text)
        self._held = text[certain:]
        return Released(text[:certain], stopped=False)

    def _num_held(self, text: str) -> int:
        """How many characters at the end of the text may still become a stop string.

        Strings that begin with such an end stand side by side among the sorted stop strings: if there is one, the first
        string that does not sort before that end is one.
        """
        longest = max(map(len, self._stop), default=0)
        for size in range(min(len(text), longest - 1), 0, -1):
            end = text[-size:]
            index = bisect_left(self._stop, end)
            if index < len(self._stop) and self._stop[index].startswith(end):
                return size
        return 0
