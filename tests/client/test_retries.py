"""Which router is asked, when again, when no more: the core alone, at times that a test makes up."""

import pytest

from isthmus.client.failure import CallFailure
from isthmus.client.retries import MAX_BACKOFF_S, MAX_REFUSALS, MIN_BACKOFF_S, SUSPECT_S, Retries
from isthmus.client.router_list import RetryBudget, RouterList
from isthmus.errors import DeadlinePassed, Draining, Overloaded, StreamGone, WorkersUnavailable
from isthmus.testing.virtual_time import SeededIds, VirtualTime

LOST = CallFailure.told(Draining("going away"))
FULL = CallFailure.told(Overloaded("full"))
NOW = 1000.0


def begin(routers: RouterList, *, now: float = NOW, timeout_s: float = 100.0, router_timeout_s: float = 5.0) -> Retries:
    ids = SeededIds(VirtualTime())
    return Retries(routers, ids, now=now, timeout_s=timeout_s, router_timeout_s=router_timeout_s)


def test_requests_take_turns() -> None:
    routers = RouterList("a:1, b:2,a:1")
    assert routers.names == "a:1, b:2"
    assert [begin(routers).router.address for _ in range(4)] == ["a:1", "b:2", "a:1", "b:2"]


def test_no_address_is_refused() -> None:
    for given in ("", " , ", []):
        with pytest.raises(ValueError, match="no router address"):
            RouterList(given)


def test_a_router_that_failed_is_asked_last_for_a_while() -> None:
    routers = RouterList(["a:1", "b:2"])
    retries = begin(routers)
    assert retries.router.address == "a:1"
    retries.broken(LOST, NOW, may_give_up=False)
    assert {begin(routers).router.address for _ in range(6)} == {retries.router.address} == {"b:2"}
    later = NOW + SUSPECT_S
    assert {begin(routers, now=later).router.address for _ in range(6)} == {"a:1", "b:2"}


def test_the_wait_grows_to_its_bound_and_starts_again_with_progress() -> None:
    retries = begin(RouterList("a:1"))
    delays = [retries.broken(LOST, NOW, may_give_up=False) for _ in range(8)]
    bounds = [min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2**number) for number in range(8)]
    assert all(bound / 2 <= delay <= bound for delay, bound in zip(delays, bounds, strict=True))
    retries.progressed()
    assert retries.broken(LOST, NOW, may_give_up=False) <= MIN_BACKOFF_S


def test_a_stream_is_looked_for_until_the_deadline() -> None:
    retries = begin(RouterList("a:1"), timeout_s=50, router_timeout_s=1)
    retries.broken(LOST, NOW + 49, may_give_up=False)
    with pytest.raises(DeadlinePassed):
        retries.broken(LOST, NOW + 50, may_give_up=False)
    with pytest.raises(DeadlinePassed):
        retries.remaining_s(NOW + 50)


def test_a_request_nobody_took_is_given_up_sooner() -> None:
    retries = begin(RouterList("a:1"), router_timeout_s=5)
    retries.failed(LOST, NOW)
    retries.failed(LOST, NOW + 4)
    with pytest.raises(WorkersUnavailable, match="no router answers at a:1"):
        retries.failed(LOST, NOW + 6)


def test_a_router_is_not_asked_before_it_said_while_another_is() -> None:
    retries = begin(RouterList(["a:1", "b:2"]))
    delay_s = retries.refused(CallFailure.told(Overloaded("full", retry_after_s=3)), NOW)
    assert (retries.router.address, delay_s <= MIN_BACKOFF_S) == ("b:2", True)
    delay_s = retries.refused(CallFailure.told(Overloaded("full", retry_after_s=7)), NOW)
    assert (retries.router.address, delay_s) == ("a:1", 3)


def test_one_request_is_refused_so_often_and_no_more() -> None:
    retries = begin(RouterList("a:1"))
    for _ in range(MAX_REFUSALS):
        retries.refused(FULL, NOW)
    with pytest.raises(Overloaded):
        retries.refused(FULL, NOW)


def test_repetitions_of_refused_requests_are_a_tenth_of_all_requests() -> None:
    routers = RouterList("a:1")
    num_requests = 1000
    num_repeated = 0
    for _ in range(num_requests):
        retries = begin(routers)
        try:
            for _ in range(3):
                retries.refused(FULL, NOW)
                num_repeated += 1
        except Overloaded:
            pass
    assert num_repeated <= 0.1 * num_requests + RetryBudget.CAPACITY
    begin(routers).broken(LOST, NOW, may_give_up=True)  # a lost router is charged to nobody


def test_what_cannot_be_repeated_is_raised() -> None:
    with pytest.raises(StreamGone):
        begin(RouterList("a:1")).failed(CallFailure.told(StreamGone("gone")), NOW)
