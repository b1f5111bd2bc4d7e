"""Sixteen streams at a time while processes of every kind are killed, frozen and restarted under them."""

import os
import random

import pytest

from isthmus.testing.stack import Stack, running_stack, until
from tests.chaos.evidence import SEED
from tests.chaos.faults import Chaos, counts
from tests.chaos.history import Oracle
from tests.chaos.quiet import all_met, num_tasks
from tests.chaos.silence import quantile, recovered
from tests.chaos.unharmed import unharmed_load

SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))
NUM_STREAMS = 16
FAULTS_PER_S = 40 / 180
ENOUGH_S = 180  # for every kind of fault to have met a stream
WORKER_KILLS, FREEZES = ("kill prefill", "kill decode"), ("freeze prefill", "freeze decode", "freeze router")
# (kinds of fault, quantile of recovered streams' silence without recompute time, seconds on two quiet cores)
BOUNDS = (
    (WORKER_KILLS, 0.5, 1.0),
    (WORKER_KILLS, 0.99, 3.0),
    (FREEZES, 0.99, 4.0),
    (("kill router",), 0.99, 2.5),
)
TASK_SLACK = 5  # hundreds of streams ran: a task left by each, or by each fault, would be more
SLOWNESS = 3.0  # of a machine that others use too

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(SECONDS + 240)]


async def as_few_tasks(stack: Stack, before: dict[str, int]) -> bool:
    return all(now <= before[name] + TASK_SLACK for name, now in (await num_tasks(stack)).items())


async def test_no_stream_is_lost_repeated_wrong_or_hung_whatever_dies(expected: dict[str, Oracle]) -> None:
    with running_stack("--routers", "2", "--prefill", "2", "--decode", "2") as stack:
        await all_met(stack)
        before = await num_tasks(stack)
        async with unharmed_load(stack, expected, num_users=NUM_STREAMS) as run:
            await Chaos(stack, random.Random(SEED), run.faults).run(SECONDS)
        await until(lambda: as_few_tasks(stack, before), 20, f"tasks as before, {before}: {await num_tasks(stack)}")
    print(counts(run.faults))
    assert len(run.faults) >= FAULTS_PER_S * SECONDS
    for kinds, part, bound_s in BOUNDS:
        waits = recovered(run.silences, *kinds)
        assert waits or SECONDS < ENOUGH_S, f"no stream had to be recovered from {kinds}: the bound says nothing"
        assert quantile(waits, part) <= SLOWNESS * bound_s, (kinds, part, sorted(waits))
