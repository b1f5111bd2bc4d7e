"""When a child is started again, and how long a start is waited for: decided without processes or real time."""

from isthmus.cli.restart_policy import FIRST_BACKOFF_S, LIVED_WELL_S, MAX_BACKOFF_S, RestartPolicy, StartPatience

NOW = 1000.0


def test_waits_double_up_to_their_bound() -> None:
    policy = RestartPolicy()
    waits = []
    for _ in range(8):
        policy.started(NOW)
        waits.append(policy.ended(NOW + 1))
    assert waits == [min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**number) for number in range(8)]


def test_a_child_that_lived_well_starts_over_with_the_first_wait() -> None:
    policy = RestartPolicy()
    for _ in range(4):
        policy.started(NOW)
        policy.ended(NOW + LIVED_WELL_S)  # not quite long enough
    policy.started(NOW)
    assert policy.ended(NOW + LIVED_WELL_S + 0.1) == FIRST_BACKOFF_S
    policy.started(NOW)
    assert policy.ended(NOW + 1) == 2 * FIRST_BACKOFF_S


def test_a_start_is_explained_before_it_is_given_up() -> None:
    patience = StartPatience(60, NOW)
    moments = (NOW, NOW + StartPatience.SHOWN_AFTER_S + 0.1, NOW + 60, NOW + 60.1)
    assert [patience.is_tried(now) for now in moments] == [False, True, True, True]
    assert [patience.is_over(now) for now in moments] == [False, False, False, True]
