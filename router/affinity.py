"""Which workers last had which prompt prefix, as far as this router remembers: a hint, never a promise."""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Sequence

STRIDE_TOKENS = 64  # prefixes are remembered at multiples of the tile
MAX_PREFIXES = 65_536


class PrefixAffinity:
    """At most `max_prefixes` prefixes, the least recently used go first."""

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


def prompt_prefixes(token_ids: Sequence[int], salt: str) -> list[bytes]:
    """Chained hashes of the prompt's prefixes of 1, 2, … strides; `salt` keeps tenants apart."""
    digest = hashlib.sha256(salt.encode()).digest()
    prefixes: list[bytes] = []
    for end in range(STRIDE_TOKENS, len(token_ids) + 1, STRIDE_TOKENS):
        packed = struct.pack(f"<{STRIDE_TOKENS}I", *token_ids[end - STRIDE_TOKENS : end])
        digest = hashlib.sha256(digest + packed).digest()
        prefixes.append(digest[:16])
    return prefixes
