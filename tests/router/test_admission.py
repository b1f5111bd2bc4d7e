"""Slots and turns: order, bounds, and exact accounting when those in line leave it."""

import random
from collections.abc import Awaitable, Callable

import pytest

from isthmus.errors import Overloaded, RequestCancelled
from isthmus.routine import FOREVER, Interrupted, Routine
from isthmus.testing.virtual_time import VirtualTime
from router.pool.admission import Admission, Line, Turn


class Visitor:
    """One request's routine: stands in a line, then does its work, and leaves."""

    def __init__(self, time: VirtualTime):
        self._driver = time.drive(self._run)
        self.routine = Routine(self._driver.ready)
        self.error: BaseException | None = None
        self.has_entered = False

    @property
    def is_over(self) -> bool:
        return self.routine.is_over

    def begin(
        self, enter: Callable[[], Turn], wait_s: float, work: Callable[[], Awaitable[object]] | None = None
    ) -> "Visitor":
        async def visit() -> None:
            with enter() as turn:
                await turn.comes(self.routine, self.routine.now + wait_s)
                self.has_entered = True
                if work is not None:
                    await work()

        self.routine.begin(visit())
        return self

    def cancel(self) -> None:
        self.routine.interrupt(RequestCancelled("on purpose"))

    def _run(self, now: float) -> float | None:
        try:
            return self.routine.turn(now)
        except Interrupted as interrupted:
            self.error = interrupted.cause
        except Overloaded as refused:
            self.error = refused
        return None


@pytest.fixture
def time() -> VirtualTime:
    return VirtualTime()


def slot(
    time: VirtualTime,
    admission: Admission,
    wait_s: float = 5.0,
    work: Callable[[Routine], Awaitable[object]] | None = None,
    priority: int = 0,
) -> Visitor:
    """Comes for a slot and stays until its work is done."""
    visitor = Visitor(time)
    order = admission.order(priority)
    stay = None if work is None else lambda: work(visitor.routine)
    visitor.begin(lambda: admission.slot(order, visitor.routine.wake), wait_s, stay)
    time.run_for(0.0)
    return visitor


def stay(routine: Routine) -> Awaitable[object]:
    """Until it is cancelled."""
    return routine.pause(FOREVER)


def test_priority_first_then_arrival(time: VirtualTime) -> None:
    admission = Admission(max_streams=1, max_queue=10)
    served: list[str] = []

    def enter(name: str, priority: int) -> Visitor:
        async def work(routine: Routine) -> None:
            served.append(name)
            if name == "first":
                await routine.pause(FOREVER)

        return slot(time, admission, work=work, priority=priority)

    first, *_ = [
        enter(name, priority) for name, priority in [("first", 0), ("a", 0), ("b", 0), ("urgent", 5), ("idle", -5)]
    ]
    assert (served, admission.num_queued) == (["first"], 4)
    first.cancel()
    time.run_for(0.0)

    assert served == ["first", "urgent", "a", "b", "idle"]
    assert (admission.num_streams, admission.num_queued) == (0, 0)


def test_over_the_bound_is_refused_at_once(time: VirtualTime) -> None:
    admission = Admission(max_streams=1, max_queue=1)
    holder = slot(time, admission, work=stay)
    waiting = slot(time, admission)
    refused = slot(time, admission)
    assert isinstance(refused.error, Overloaded)
    assert refused.error.retry_after_s
    assert not waiting.has_entered
    holder.cancel()
    time.run_for(0.0)
    assert waiting.has_entered
    assert admission.num_streams == 0


def test_those_who_look_for_a_place_are_in_the_queue_too(time: VirtualTime) -> None:
    admission = Admission(max_streams=10, max_queue=1)
    first, second = Visitor(time), Visitor(time)
    for visitor in (first, second):
        order = admission.order(0)
        enter = lambda order=order, visitor=visitor: admission.placing.enter(order, visitor.routine.wake)  # noqa: E731
        visitor.begin(enter, 5.0, (lambda: stay(first.routine)) if visitor is first else None)
        time.run_for(0.0)
    assert isinstance(slot(time, admission).error, Overloaded)
    first.cancel()
    time.run_for(0.0)
    assert second.has_entered
    assert admission.num_queued == 0


def test_waiting_too_long_is_refused_and_costs_no_slot(time: VirtualTime) -> None:
    admission = Admission(max_streams=1, max_queue=10)
    holder = slot(time, admission, work=stay)
    late = slot(time, admission, wait_s=0.01)
    time.run_for(0.009)
    assert late.error is None
    time.run_for(0.002)
    assert isinstance(late.error, Overloaded)
    holder.cancel()
    time.run_for(0.0)
    assert slot(time, admission, wait_s=0.01).has_entered
    assert (admission.num_streams, admission.num_queued) == (0, 0)


@pytest.mark.parametrize("seed", range(40))
def test_random_cancels_lose_no_permit(seed: int) -> None:
    time = VirtualTime(seed)
    rng = random.Random(seed)
    line = Line(3)
    admission = Admission(max_streams=3, max_queue=1000)
    num_inside: list[int] = [0]
    most_inside: list[int] = [0]

    def visitor() -> Visitor:
        made = Visitor(time)

        async def work() -> None:
            num_inside[0] += 1
            most_inside[0] = max(most_inside[0], num_inside[0])
            try:
                for _ in range(rng.randrange(4)):
                    await made.routine.pause(made.routine.now + 0.001)
            finally:
                num_inside[0] -= 1

        order = admission.order(rng.randrange(3))
        return made.begin(lambda: line.enter(order, made.routine.wake), rng.choice([0.001, 0.002, 5.0]), work)

    visitors = [visitor() for _ in range(200)]
    while not all(visitor.is_over for visitor in visitors):
        rng.choice(visitors).cancel()
        time.run_for(rng.choice([0.0, 0.0005]))

    assert all(isinstance(visitor.error, Overloaded | RequestCancelled | None) for visitor in visitors)
    assert most_inside == [3]
    assert (line.num_free, line.num_waiting, num_inside) == (3, 0, [0])


def test_a_cancel_in_the_moment_of_the_turn_passes_it_on(time: VirtualTime) -> None:
    line = Line(1)
    admission = Admission(1, 10)
    holder = line.enter(admission.order(0), lambda: None)
    first, second = Visitor(time), Visitor(time)
    for visitor in (first, second):
        order = admission.order(0)
        visitor.begin(lambda order=order, visitor=visitor: line.enter(order, visitor.routine.wake), 5.0)
    time.run_for(0.0)
    holder.leave()  # hands the turn to `first`, which has not run yet
    first.cancel()
    time.run_for(0.0)

    assert isinstance(first.error, RequestCancelled)
    assert not first.has_entered
    assert second.has_entered
    assert line.num_free == 1


def test_who_leaves_twice_gives_one_permit_back() -> None:
    line = Line(1)
    turn = line.enter((0, 0), lambda: None)
    turn.leave()
    turn.leave()
    assert line.num_free == 1
