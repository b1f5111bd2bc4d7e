"""Routines: run only by their turns, waiting for a wake or a moment, ended from outside where they wait."""

import pytest

from isthmus.routine import Interrupted, Routine


class Asked:
    """Counts how often a driver was asked for a turn."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def test_it_goes_on_when_woken_or_when_its_time_has_come() -> None:
    asked, steps = Asked(), list[str]()
    routine = Routine(asked)

    async def work() -> None:
        steps.append("begun")
        await routine.pause(until=5.0)
        steps.append(f"at {routine.now}")
        await routine.pause()
        steps.append("woken")

    routine.begin(work())
    assert asked.times == 1
    assert routine.turn(1.0) == 5.0
    assert routine.turn(4.9) == 5.0
    assert routine.turn(5.5) is None
    assert steps == ["begun", "at 5.5"]
    assert not routine.is_over
    routine.wake()
    routine.wake()
    assert asked.times == 2
    assert routine.turn(5.6) is None
    assert (steps[-1], routine.is_over) == ("woken", True)


@pytest.mark.parametrize(("at", "holds"), [(2.0, True), (3.5, False)])
def test_a_condition_is_waited_for_no_longer_than_said(at: float, holds: bool) -> None:
    routine, found, there = Routine(Asked()), list[bool](), list[int]()

    async def work() -> None:
        found.append(await routine.wait_for(lambda: there, until=3.0))

    routine.begin(work())
    assert routine.turn(1.0) == 3.0
    if holds:
        there.append(1)
        routine.wake()
    routine.turn(at)
    assert found == [holds]


def test_an_interruption_ends_it_where_it_waits_and_no_handler_takes_it_for_a_failure() -> None:
    routine, released = Routine(Asked()), list[str]()

    async def work() -> None:
        try:
            await routine.pause()
        except Exception:  # noqa: BLE001 - what the test is about
            released.append("wrong")
        finally:
            released.append("let go")

    routine.begin(work())
    routine.turn(1.0)
    routine.interrupt(ValueError("later"), at=9.0)
    routine.interrupt(ValueError("sooner"), at=4.0)
    routine.interrupt(ValueError("latest"), at=20.0)
    assert routine.turn(2.0) == 4.0
    with pytest.raises(Interrupted) as interrupted:
        routine.turn(4.0)
    assert (str(interrupted.value.cause), released, routine.is_over) == ("sooner", ["let go"], True)


def test_waking_itself_runs_on_without_asking_for_another_turn() -> None:
    asked, steps = Asked(), list[int]()
    routine = Routine(asked)

    async def work() -> None:
        for step in range(3):
            routine.wake()
            await routine.pause()
            steps.append(step)

    routine.begin(work())
    routine.turn(0.0)
    assert (steps, asked.times, routine.is_over) == ([0, 1, 2], 1, True)


def test_closing_releases_what_it_holds() -> None:
    routine, released = Routine(Asked()), list[str]()

    async def work() -> None:
        try:
            await routine.pause()
        finally:
            released.append("let go")

    routine.begin(work())
    routine.turn(0.0)
    routine.close()
    assert (released, routine.is_over) == (["let go"], True)
