"""Two copies of a stream in, one stream out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import DataLoss
from isthmus.text.token_merge import TokenMerge

Copy = tuple[int, list[int]]


def merge_of(max_tokens: int) -> TokenMerge[int]:
    return TokenMerge(max_tokens, id_of=lambda token: token, identity=lambda token: token)


def cut(tokens: list[int], draw: st.DataObject) -> list[Copy]:
    """One source's messages: all tokens in order, grouped at random."""
    messages: list[Copy] = []
    start = 0
    while start < len(tokens):
        end = draw.draw(st.integers(start + 1, len(tokens)))
        messages.append((start, tokens[start:end]))
        start = end
    return messages


@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=30), data=st.data())
def test_any_interleaving_of_any_grouping_delivers_each_index_once(tokens: list[int], data: st.DataObject) -> None:
    sources = [cut(tokens, data), cut(tokens, data), [(0, tokens[:1])]]
    merge = merge_of(len(tokens))
    delivered: list[int] = []

    while any(sources):
        source = data.draw(st.sampled_from([source for source in sources if source]))
        index, group = source.pop(0)
        fresh = merge.add(index, group)
        assert fresh == tokens[len(delivered) : len(delivered) + len(fresh)]
        delivered += fresh
        assert merge.next_index == len(delivered)

    assert delivered == tokens


@given(tokens=st.lists(st.integers(0, 5), min_size=2, max_size=20), data=st.data())
def test_messages_out_of_order_wait_for_their_turn(tokens: list[int], data: st.DataObject) -> None:
    merge = merge_of(len(tokens))
    delivered: list[int] = []
    for index, group in data.draw(st.permutations(cut(tokens, data))):
        delivered += merge.add(index, group)
    assert delivered == tokens


@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=20), data=st.data())
def test_a_differing_copy_is_never_passed_over(tokens: list[int], data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(tokens) - 1))
    merge = merge_of(len(tokens))
    merge.add(0, tokens)
    with pytest.raises(DataLoss):
        merge.add(position, [tokens[position] + 1])


def test_copies_that_wait_are_compared_too() -> None:
    merge = merge_of(5)
    merge.add(2, [7])
    with pytest.raises(DataLoss):
        merge.add(2, [8])


def test_tokens_beyond_the_request_are_refused() -> None:
    merge = merge_of(3)
    with pytest.raises(DataLoss):
        merge.add(2, [1, 2])
