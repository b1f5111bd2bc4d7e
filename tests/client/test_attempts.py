"""Which router is asked, when again, when no more: the state machine alone, on a clock that a test moves."""

import pytest

from isthmus.client.attempts import (
    MAX_BACKOFF_S,
    MAX_REFUSALS,
    MIN_BACKOFF_S,
    SUSPECT_S,
    Attempts,
    Failure,
    RetryBudget,
    Routers,
)
from isthmus.errors import DeadlinePassed, Draining, Overloaded, StreamGone, WorkersUnavailable
from isthmus.testing.manual_clock import ManualClock

LOST = Failure(Draining("going away"))


def attempts_at(routers: Routers, *, timeout_s: float = 100.0, router_timeout_s: float = 5.0) -> Attempts:
    return Attempts(routers, timeout_s=timeout_s, router_timeout_s=router_timeout_s)


def test_requests_take_turns() -> None:
    routers = Routers("a:1, b:2,a:1", ManualClock())
    assert routers.names == "a:1, b:2"
    assert [attempts_at(routers).router.address for _ in range(4)] == ["a:1", "b:2", "a:1", "b:2"]


def test_no_address_is_refused() -> None:
    for given in ("", " , ", []):
        with pytest.raises(ValueError, match="no router address"):
            Routers(given, ManualClock())


def test_a_router_that_failed_is_asked_last_for_a_while() -> None:
    clock = ManualClock()
    routers = Routers(["a:1", "b:2"], clock)
    attempts = attempts_at(routers)
    assert attempts.router.address == "a:1"
    attempts.broken(LOST, may_give_up=False)
    assert {attempts_at(routers).router.address for _ in range(6)} == {attempts.router.address} == {"b:2"}
    clock.advance(SUSPECT_S)
    assert {attempts_at(routers).router.address for _ in range(6)} == {"a:1", "b:2"}


def test_the_wait_grows_to_its_bound_and_starts_again_with_progress() -> None:
    attempts = attempts_at(Routers("a:1", ManualClock()))
    delays = [attempts.broken(LOST, may_give_up=False) for _ in range(8)]
    bounds = [min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2**number) for number in range(8)]
    assert all(bound / 2 <= delay <= bound for delay, bound in zip(delays, bounds, strict=True))
    attempts.progressed()
    assert attempts.broken(LOST, may_give_up=False) <= MIN_BACKOFF_S


def test_a_stream_is_looked_for_until_the_deadline() -> None:
    clock = ManualClock()
    attempts = attempts_at(Routers("a:1", clock), timeout_s=50, router_timeout_s=1)
    clock.advance(49)
    attempts.broken(LOST, may_give_up=False)
    clock.advance(1)
    with pytest.raises(DeadlinePassed):
        attempts.broken(LOST, may_give_up=False)
    with pytest.raises(DeadlinePassed):
        attempts.remaining_s()


def test_a_request_nobody_took_is_given_up_sooner() -> None:
    clock = ManualClock()
    attempts = attempts_at(Routers("a:1", clock), router_timeout_s=5)
    attempts.failed(LOST)
    clock.advance(4)
    attempts.failed(LOST)
    clock.advance(2)
    with pytest.raises(WorkersUnavailable, match="no router answers at a:1"):
        attempts.failed(LOST)


def test_a_router_is_not_asked_before_it_said_while_another_is() -> None:
    attempts = attempts_at(Routers(["a:1", "b:2"], ManualClock()))
    delay_s = attempts.refused(Failure(Overloaded("full", retry_after_s=3)))
    assert (attempts.router.address, delay_s <= MIN_BACKOFF_S) == ("b:2", True)
    delay_s = attempts.refused(Failure(Overloaded("full", retry_after_s=7)))
    assert (attempts.router.address, delay_s) == ("a:1", 3)


def test_one_request_is_refused_so_often_and_no_more() -> None:
    attempts = attempts_at(Routers("a:1", ManualClock()))
    for _ in range(MAX_REFUSALS):
        attempts.refused(Failure(Overloaded("full")))
    with pytest.raises(Overloaded):
        attempts.refused(Failure(Overloaded("full")))


def test_repetitions_of_refused_requests_are_a_tenth_of_all_requests() -> None:
    routers = Routers("a:1", ManualClock())
    num_requests, num_repeated = 1000, 0
    for _ in range(num_requests):
        attempts = attempts_at(routers)
        try:
            for _ in range(3):
                attempts.refused(Failure(Overloaded("full")))
                num_repeated += 1
        except Overloaded:
            pass
    assert num_repeated <= 0.1 * num_requests + RetryBudget.CAPACITY
    attempts_at(routers).broken(LOST, may_give_up=True)  # a lost router is charged to nobody


def test_what_cannot_be_repeated_is_raised() -> None:
    with pytest.raises(StreamGone):
        attempts_at(Routers("a:1", ManualClock())).failed(Failure(StreamGone("gone")))
