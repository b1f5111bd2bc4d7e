"""Who holds which block of the cache: references, content addresses, blocks set aside, and sends that still read."""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

from isthmus.errors import NoFreeBlocks
from isthmus.types import BlockCounts

_RETRY_AFTER_S = 0.1


class BlockPool:
    """Every block is blank, cached or referenced. Cached ones count as free too; the oldest go when blank ones run out.

    Any thread may call; each call is atomic and costs O(1) per block. At all times `set aside <= free`, so a holder of
    blocks set aside always gets them.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._lock = threading.Lock()
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}  # published blocks, referenced or cached
        self._blank = deque(range(num_blocks))  # free and without content
        self._cached: OrderedDict[int, None] = OrderedDict()  # free with content, oldest first
        self._sends: Counter[int] = Counter()  # unacknowledged sends per draining block
        self._num_set_aside = 0
        self._num_changes = 0  # of the contents

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The longest run of blocks with these contents, one more reference each; shorter if the rest is set aside."""
        blocks: list[int] = []
        with self._lock:
            for block_hash in hashes:
                block = self._block_of.get(block_hash)
                if block is None or (self._references[block] == 0 and self._num_available() == 0):
                    break
                self._take(block)
                blocks.append(block)
        return blocks

    def set_aside(self, num_blocks: int) -> None:
        """Promises blocks for later `allocate(from_set_aside=True)`. Raises NoFreeBlocks and promises nothing."""
        with self._lock:
            self._require(num_blocks)
            self._num_set_aside += num_blocks

    def give_up(self, num_blocks: int) -> None:
        """Takes back what was set aside and not allocated."""
        with self._lock:
            assert 0 <= num_blocks <= self._num_set_aside, "only what was set aside can be given up"
            self._num_set_aside -= num_blocks

    def allocate(self, num_blocks: int, *, from_set_aside: bool = False) -> list[int]:
        """Blank blocks, one reference each. Raises NoFreeBlocks and takes nothing; never from what was set aside."""
        with self._lock:
            if from_set_aside:
                assert num_blocks <= self._num_set_aside, "only what was set aside can be allocated from it"
                self._num_set_aside -= num_blocks
            else:
                self._require(num_blocks)
            blocks = [self._blank.popleft() if self._blank else self._evict() for _ in range(num_blocks)]
            for block in blocks:
                self._references[block] = 1
            return blocks

    def release(self, block_ids: Sequence[int]) -> None:
        """One reference less. A sequence's last block ages first, so that what stays cached is a prefix."""
        with self._lock:
            self._release(block_ids)

    def begin_drain(self, block_ids: Sequence[int]) -> None:
        """A send reads these blocks until `end_drain`: they keep a reference of its own and are not reused."""
        with self._lock:
            for block in block_ids:
                assert self._references[block] > 0, f"block {block} is not referenced"
                self._references[block] += 1
            self._sends.update(block_ids)

    def end_drain(self, block_ids: Sequence[int]) -> None:
        with self._lock:
            for block in block_ids:
                assert self._sends[block] > 0, f"no send reads block {block}"
                self._sends[block] -= 1
                if not self._sends[block]:
                    del self._sends[block]
            self._release(block_ids)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Makes a full, referenced block reusable by content; the first block with that content stays the one."""
        with self._lock:
            assert self._references[block_id] > 0, f"block {block_id} is not referenced"
            if block_hash in self._block_of:
                return
            assert self._hash_of[block_id] is None, f"block {block_id} has other content"
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash
            self._num_changes += 1

    def counts(self) -> BlockCounts:
        with self._lock:
            cached = len(self._cached)
            draining = len(self._sends)
            free = len(self._blank) + cached
            return BlockCounts(self.num_blocks, free, cached, self.num_blocks - free, draining)

    def published(self) -> tuple[int, list[bytes]]:
        """Contents that can be matched now, and a number that grows with every change of them."""
        with self._lock:
            return self._num_changes, list(self._block_of)

    def _num_available(self) -> int:
        return len(self._blank) + len(self._cached) - self._num_set_aside

    def _require(self, num_blocks: int) -> None:
        assert num_blocks >= 0, "a number of blocks"
        if num_blocks > self._num_available():
            detail = f"{num_blocks} blocks needed, {self._num_available()} of {self.num_blocks} free"
            raise NoFreeBlocks(detail, retry_after_s=_RETRY_AFTER_S)

    def _take(self, block: int) -> None:
        if self._references[block] == 0:
            del self._cached[block]
        self._references[block] += 1

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        content = self._hash_of[block]
        assert content is not None, "cached blocks have content"
        del self._block_of[content]
        self._num_changes += 1
        self._hash_of[block] = None
        return block

    def _release(self, block_ids: Sequence[int]) -> None:
        for block in reversed(block_ids):
            assert self._references[block] > 0, f"block {block} is not referenced"
            self._references[block] -= 1
            if self._references[block]:
                continue
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None
