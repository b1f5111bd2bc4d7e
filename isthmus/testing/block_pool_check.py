"""The invariant of a block pool, checked from inside; O(num_blocks)."""

# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false
from collections.abc import Iterable

from isthmus.kv.block_pool import BlockPool


def check_partition(pool: BlockPool) -> None:
    """Asserts the partition; O(num_blocks), for tests and idle moments."""
    with pool._lock:
        blank = set(pool._blank)
        cached = set(pool._cached)
        referenced = {block for block, count in enumerate(pool._references) if count > 0}
        assert len(blank) == len(pool._blank), "a block is blank twice"
        assert min(pool._references, default=0) >= 0, "a negative reference count"
        assert sorted([*blank, *cached, *referenced]) == list(range(pool.num_blocks)), "every block is in one part"
        published = {block for block, content in enumerate(pool._hash_of) if content is not None}
        assert {content: block for content, block in pool._block_of.items() if pool._hash_of[block] == content} == (
            pool._block_of
        ), "two indexes of contents disagree"
        assert len(published) == len(pool._block_of), "a content without an address"
        assert cached <= published <= cached | referenced, "a blank block with content, or a cached one without"
        assert all(0 < count <= pool._references[block] for block, count in pool._sends.items()), "a lost send"
        assert 0 <= pool._num_set_aside <= len(blank) + len(cached), "more set aside than free"


def check_referenced(pool: BlockPool, blocks: Iterable[int]) -> None:
    """Asserts that somebody holds each of these blocks."""
    with pool._lock:
        free = [block for block in blocks if not pool._references[block]]
        assert not free, f"blocks {free} were given back"
