"""Slots and turns: order, bounds, and exact accounting under cancellation."""

import asyncio
import random

import pytest

from isthmus.errors import Overloaded
from router.admission import Admission, Line


async def test_priority_first_then_arrival() -> None:
    admission = Admission(max_streams=1, max_queue=10)
    served: list[str] = []
    release = asyncio.Event()

    async def enter(name: str, priority: int) -> None:
        async with admission.slot(admission.order(priority), 5.0):
            served.append(name)
            await release.wait()

    async with asyncio.TaskGroup() as group:
        for name, priority in [("first", 0), ("a", 0), ("b", 0), ("urgent", 5), ("idle", -5)]:
            group.create_task(enter(name, priority))
            await asyncio.sleep(0)
        release.set()

    assert served == ["first", "urgent", "a", "b", "idle"]
    assert (admission.num_streams, admission.num_queued) == (0, 0)


async def test_over_the_bound_is_refused_at_once() -> None:
    admission = Admission(max_streams=1, max_queue=1)
    async with admission.slot(admission.order(0), 5.0):
        waiting = asyncio.create_task(_pass_through(admission, 5.0))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refusal:
            await _pass_through(admission, 5.0)
        assert refusal.value.retry_after_s
    await waiting
    assert admission.num_streams == 0


async def test_those_who_look_for_a_place_are_in_the_queue_too() -> None:
    admission = Admission(max_streams=10, max_queue=1)
    async with admission.placing.turn(admission.order(0), 5.0):
        second = asyncio.create_task(_place(admission))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await _pass_through(admission, 5.0)
    await second


async def test_waiting_too_long_is_refused_and_costs_no_slot() -> None:
    admission = Admission(max_streams=1, max_queue=10)
    async with admission.slot(admission.order(0), 5.0):
        with pytest.raises(Overloaded):
            await _pass_through(admission, 0.01)
    await _pass_through(admission, 0.01)
    assert (admission.num_streams, admission.num_queued) == (0, 0)


@pytest.mark.parametrize("seed", range(8))
async def test_random_cancels_lose_no_permit(seed: int) -> None:
    rng = random.Random(seed)
    line = Line(3)
    admission = Admission(max_streams=3, max_queue=1000)
    num_inside, most_inside = 0, 0

    async def visit() -> None:
        nonlocal num_inside, most_inside
        async with line.turn(admission.order(rng.randrange(3)), rng.choice([0.001, 0.002, 5.0])):
            num_inside += 1
            most_inside = max(most_inside, num_inside)
            try:
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                num_inside -= 1

    tasks = [asyncio.create_task(visit()) for _ in range(200)]
    while any(not task.done() for task in tasks):
        rng.choice(tasks).cancel()
        await asyncio.sleep(0)
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert all(result is None or isinstance(result, asyncio.CancelledError | Overloaded) for result in results)
    assert most_inside <= 3
    assert (line.num_free, line.num_waiting, num_inside) == (3, 0, 0)


async def test_a_cancel_in_the_moment_of_the_turn_passes_it_on() -> None:
    line = Line(1)
    admission = Admission(1, 10)
    entered = asyncio.Event()

    async def visit() -> None:
        async with line.turn(admission.order(0), 5.0):
            entered.set()

    holder = line.turn(admission.order(0), 5.0)
    await holder.__aenter__()
    first, second = asyncio.create_task(visit()), asyncio.create_task(visit())
    await asyncio.sleep(0)
    await holder.__aexit__(None, None, None)  # hands the turn to `first`, which has not run yet
    first.cancel()
    await asyncio.gather(first, second, return_exceptions=True)

    assert first.cancelled()
    assert entered.is_set()
    assert line.num_free == 1


async def _pass_through(admission: Admission, timeout_s: float) -> None:
    async with admission.slot(admission.order(0), timeout_s):
        pass


async def _place(admission: Admission) -> None:
    async with admission.placing.turn(admission.order(0), 5.0):
        pass
