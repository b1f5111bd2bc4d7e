"""Placement as pure scoring."""

from dataclasses import replace

from isthmus.kv.prefix import prefix_hashes, prefix_scope
from router.pool.policy import (
    MAX_TOKENS_AHEAD,
    STRIDE_TOKENS,
    DecodeView,
    NumericsClass,
    PrefillView,
    PrefixAffinity,
    choose_class,
    choose_prefill,
    rank_decode,
)

ONE = NumericsClass("model", "layout", "numerics-1")
TWO = NumericsClass("model", "layout", "numerics-2")
DECODE = DecodeView("d", ONE, block_size=16, total_blocks=100, reported_free_blocks=100, reserved_blocks=0)
PREFILL = PrefillView("p", ONE, num_tokens_ahead=0, num_queued=0)


def prefixes(prompt: list[int], tenant: str) -> list[bytes]:
    return prefix_hashes(prompt, STRIDE_TOKENS, prefix_scope("layout", tenant=tenant))


def decode(incarnation: str, **changes: object) -> DecodeView:
    return replace(DECODE, incarnation=incarnation, **changes)  # type: ignore[arg-type]


def prefill(incarnation: str, **changes: object) -> PrefillView:
    return replace(PREFILL, incarnation=incarnation, **changes)  # type: ignore[arg-type]


def test_a_class_needs_both_roles() -> None:
    assert choose_class([DECODE], [prefill("p", numerics=TWO)]) is None
    assert choose_class([DECODE], []) is None
    assert choose_class([DECODE, decode("e", numerics=TWO)], [PREFILL]) == ONE


def test_the_class_with_more_room_is_chosen() -> None:
    pool = [decode("a", reported_free_blocks=10), decode("b", numerics=TWO, reported_free_blocks=11)]
    assert choose_class(pool, [PREFILL, prefill("q", numerics=TWO)]) == TWO


def test_most_room_comes_first_and_full_workers_last() -> None:
    pool = [decode("full", reported_free_blocks=0), decode("some", reported_free_blocks=50), decode("most")]
    assert rank_decode(pool, 100) == ["most", "some", "full"]


def test_reservations_since_the_report_count() -> None:
    pool = [decode("a", reserved_blocks=60), decode("b", reported_free_blocks=50)]
    assert rank_decode(pool, 100) == ["b", "a"]


def test_a_prefix_cached_there_is_room_too() -> None:
    pool = [decode("a", reported_free_blocks=50), decode("b", reported_free_blocks=48, num_prefix_tokens=64)]
    assert rank_decode(pool, 100) == ["b", "a"]


def test_what_never_fits_is_not_asked() -> None:
    assert rank_decode([decode("small", total_blocks=2), decode("large")], 16 * 2 + 1) == ["large"]


def test_avoided_workers_are_asked_only_after_the_others() -> None:
    assert rank_decode([decode("a"), decode("b", reported_free_blocks=1)], 10, avoid={"a"}) == ["b", "a"]
    assert choose_prefill([PREFILL, prefill("q", num_tokens_ahead=500)], avoid={"p"}) == "q"
    assert choose_prefill([PREFILL], avoid={"p"}) == "p"


def test_prefill_goes_to_the_least_work() -> None:
    assert choose_prefill([prefill("a", num_tokens_ahead=10), prefill("b", num_tokens_ahead=9)]) == "b"
    assert choose_prefill([prefill("a", num_queued=3), prefill("b", num_queued=2)]) == "b"


def test_a_remembered_prefix_is_work_saved() -> None:
    assert choose_prefill([prefill("a", num_tokens_ahead=64, num_prefix_tokens=128), prefill("b")]) == "a"
    assert choose_prefill([prefill("a", num_tokens_ahead=300, num_prefix_tokens=128), prefill("b")]) == "b"


def test_nobody_is_handed_more_than_two_tile_budgets() -> None:
    assert choose_prefill([prefill("a", num_tokens_ahead=MAX_TOKENS_AHEAD)]) is None


def test_affinity_remembers_the_last_worker_of_each_prefix() -> None:
    prompt = list(range(3 * STRIDE_TOKENS))
    affinity = PrefixAffinity()
    affinity.remember(prefixes(prompt, "t"), ("a", "d"))
    affinity.remember(prefixes(prompt[:STRIDE_TOKENS], "t"), ("b", "d"))

    longer = prefixes([*prompt, 1, 2], "t")
    assert affinity.num_prefix_tokens(longer, "a") == 3 * STRIDE_TOKENS
    assert affinity.num_prefix_tokens(longer, "b") == STRIDE_TOKENS
    assert affinity.num_prefix_tokens(longer, "d") == 3 * STRIDE_TOKENS
    assert affinity.num_prefix_tokens(prefixes(prompt, "other"), "a") == 0


def test_affinity_is_bounded() -> None:
    affinity = PrefixAffinity(max_prefixes=2)
    for first in range(5):
        affinity.remember(prefixes([first] * STRIDE_TOKENS, ""), ("a",))
    known = [affinity.num_prefix_tokens(prefixes([i] * STRIDE_TOKENS, ""), "a") > 0 for i in range(5)]
    assert known == [False, False, False, True, True]
