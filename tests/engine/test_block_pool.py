"""The block pool: references, contents, promises and draining sends, against a plain model and under threads."""

import random
import threading
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isthmus.errors import NoFreeBlocks
from isthmus.kv.block_pool import BlockPool
from isthmus.testing.block_pool_check import check_partition
from isthmus.types import BlockCounts

CONTENT = [bytes([i]) * 16 for i in range(6)]


def published(pool: BlockPool, *contents: bytes) -> list[int]:
    """Cached blocks with these contents, the first the longest kept."""
    blocks = pool.allocate(len(contents))
    for block, content in zip(blocks, contents, strict=True):
        pool.publish(block, content)
    pool.release(blocks)
    return blocks


# ---- one behaviour each


def test_a_cached_block_is_found_again_and_counts_as_free_until_then() -> None:
    pool = BlockPool(4, 16)
    blocks = published(pool, *CONTENT[:3])
    assert pool.counts() == BlockCounts(total=4, free=4, cached=3, referenced=0)
    assert pool.match([*CONTENT[:2], b"unknown", CONTENT[2]]) == blocks[:2]
    assert pool.counts() == BlockCounts(total=4, free=2, cached=1, referenced=2)
    assert pool.match(CONTENT[:3]) == blocks  # two of them have two holders now
    pool.release(blocks)
    pool.release(blocks[:2])
    check_partition(pool)
    assert pool.counts().cached == 3


def test_the_oldest_content_goes_first_and_prefixes_outlive_their_ends() -> None:
    pool = BlockPool(4, 16)
    published(pool, *CONTENT[:2])
    published(pool, *CONTENT[2:4])
    pool.release(pool.match(CONTENT[:1]))  # used again: now the youngest
    pool.allocate(1)
    assert pool.match([CONTENT[1]]) == []
    pool.allocate(1)
    assert pool.match([CONTENT[3]]) == []
    assert len(pool.match([CONTENT[0]]) + pool.match([CONTENT[2]])) == 2


def test_allocation_takes_all_or_nothing() -> None:
    pool = BlockPool(4, 16)
    pool.allocate(3)
    with pytest.raises(NoFreeBlocks, match="2 blocks needed, 1 of 4 free") as caught:
        pool.allocate(2)
    assert caught.value.retry_after_s is not None
    assert pool.counts().free == 1


def test_what_is_set_aside_is_never_given_to_another() -> None:
    pool = BlockPool(4, 16)
    published(pool, *CONTENT[:4])
    pool.set_aside(3)
    with pytest.raises(NoFreeBlocks):
        pool.set_aside(2)
    with pytest.raises(NoFreeBlocks):
        pool.allocate(2)
    assert len(pool.match(CONTENT[:4])) == 1  # a cached block that is taken is no longer free
    assert len(pool.allocate(2, from_set_aside=True)) == 2
    pool.give_up(1)
    assert len(pool.allocate(1)) == 1
    check_partition(pool)


def test_a_draining_block_is_not_reused_although_its_request_ended() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(2)
    pool.begin_drain(blocks)
    pool.begin_drain(blocks[:1])
    pool.release(blocks)
    assert pool.counts() == BlockCounts(total=2, free=0, cached=0, referenced=2, draining=2)
    pool.end_drain(blocks)
    assert pool.counts() == BlockCounts(total=2, free=1, cached=0, referenced=1, draining=1)
    pool.end_drain(blocks[:1])
    assert pool.counts() == BlockCounts(total=2, free=2, cached=0, referenced=0)


def test_the_first_block_with_a_content_stays_the_one() -> None:
    pool = BlockPool(2, 16)
    first, second = pool.allocate(2)
    pool.publish(first, CONTENT[0])
    pool.publish(first, CONTENT[0])
    pool.publish(second, CONTENT[0])
    pool.release([second])
    assert pool.counts().cached == 0
    assert pool.match(CONTENT[:1]) == [first]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.release([1]),
        lambda pool: pool.release([0, 0]),
        lambda pool: pool.begin_drain([1]),
        lambda pool: pool.end_drain([0]),
        lambda pool: pool.publish(1, CONTENT[0]),
        lambda pool: pool.give_up(1),
        lambda pool: pool.allocate(1, from_set_aside=True),
    ],
)
def test_misuse_is_our_own_bug(misuse: object) -> None:
    pool = BlockPool(2, 16)
    assert pool.allocate(1) == [0]
    with pytest.raises(AssertionError):
        misuse(pool)  # type: ignore[operator]


# ---- against a model


class PoolMachine(RuleBasedStateMachine):
    """Holders with reference lists; the pool must agree with plain counting over them."""

    SIZE = 7

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.SIZE, 16)
        self.held: list[list[int]] = []
        self.drained: list[list[int]] = []
        self.set_aside = 0
        self.content: dict[int, bytes] = {}  # may be evicted when nobody holds the block

    @property
    def references(self) -> Counter[int]:
        return Counter(block for blocks in [*self.held, *self.drained] for block in blocks)

    @property
    def num_free(self) -> int:
        return self.SIZE - len(self.references)

    @rule(num=st.integers(0, 4))
    def allocate(self, num: int) -> None:
        if num > self.num_free - self.set_aside:
            with pytest.raises(NoFreeBlocks):
                self.pool.allocate(num)
        else:
            self._receive(self.pool.allocate(num), num)

    @rule(num=st.integers(0, 4))
    def promise(self, num: int) -> None:
        if num > self.num_free - self.set_aside:
            with pytest.raises(NoFreeBlocks):
                self.pool.set_aside(num)
        else:
            self.pool.set_aside(num)
            self.set_aside += num

    @precondition(lambda self: self.set_aside)
    @rule(data=st.data())
    def use_or_give_up_a_promise(self, data: st.DataObject) -> None:
        num = data.draw(st.integers(1, self.set_aside))
        self.set_aside -= num
        if data.draw(st.booleans()):
            self.pool.give_up(num)
        else:
            self._receive(self.pool.allocate(num, from_set_aside=True), num)

    def _receive(self, blocks: list[int], num: int) -> None:
        assert len(set(blocks)) == num
        assert not set(blocks) & set(self.references)
        for block in blocks:
            self.content.pop(block, None)
        self.held.append(blocks)

    @rule(contents=st.lists(st.sampled_from(CONTENT), max_size=4, unique=True))
    def match(self, contents: list[bytes]) -> None:
        before, room = self.references, self.num_free - self.set_aside
        blocks = self.pool.match(contents)
        assert [self.content[block] for block in blocks] == contents[: len(blocks)]
        if len(blocks) < len(contents):
            other = [b for b, content in self.content.items() if content == contents[len(blocks)]]
            assert not other or room == len([b for b in blocks if b not in before])  # gone, or all else is promised
        self.held.append(blocks)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), content=st.sampled_from(CONTENT))
    def publish(self, data: st.DataObject, content: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.references)))
        if block in self.content and self.content[block] != content and content not in self.content.values():
            return  # a block's content does not change
        self.pool.publish(block, content)
        if content not in self.content.values():
            self.content[block] = content

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def begin_drain(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.begin_drain(blocks)
        self.drained.append(list(blocks))

    @precondition(lambda self: self.drained)
    @rule(data=st.data())
    def end_drain(self, data: st.DataObject) -> None:
        self.pool.end_drain(self.drained.pop(data.draw(st.integers(0, len(self.drained) - 1))))

    @invariant()
    def agrees(self) -> None:
        check_partition(self.pool)
        cached = set(self.content) - set(self.references)
        draining = {block for blocks in self.drained for block in blocks}
        assert self.pool.counts() == BlockCounts(
            self.SIZE, self.num_free, len(cached), len(self.references), len(draining)
        )


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase


def test_threads_never_share_a_fresh_block() -> None:
    pool, owners, failures = BlockPool(24, 16), [0] * 24, []

    def work(number: int) -> None:
        choose = random.Random(number)
        try:
            for _ in range(400):
                cached = pool.match([CONTENT[0], CONTENT[1]])
                try:
                    pool.set_aside(2)
                except NoFreeBlocks:
                    pool.release(cached)
                    continue
                blocks = pool.allocate(1, from_set_aside=True)
                owners[blocks[0]] += 1
                assert owners[blocks[0]] == 1
                pool.begin_drain(blocks)
                if choose.random() < 0.5:
                    pool.publish(blocks[0], choose.choice(CONTENT))
                owners[blocks[0]] -= 1
                pool.release(cached + blocks)
                pool.give_up(1)
                pool.end_drain(blocks)
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    check_partition(pool)
    assert (pool.counts().free, pool.counts().draining) == (24, 0)
