"""Sixteen streams at a time while processes of every kind are killed, frozen and restarted under them."""

import os
import random

import pytest

from isthmus.testing.stack import running_stack
from tests.chaos.evidence import SEED
from tests.chaos.faults import Chaos, counts
from tests.chaos.history import Oracle
from tests.chaos.unharmed import unharmed_load

SECONDS = float(os.environ.get("CHAOS_SECONDS", "180"))
NUM_STREAMS = 16
FAULTS_PER_S = 40 / 180

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(SECONDS + 240)]


async def test_no_stream_is_lost_repeated_wrong_or_hung_whatever_dies(expected: dict[str, Oracle]) -> None:
    with running_stack("--routers", "2", "--prefill", "2", "--decode", "2") as stack:
        async with unharmed_load(stack, expected, num_users=NUM_STREAMS) as (load, faults):
            await Chaos(stack, random.Random(SEED), faults).run(SECONDS)
    print(counts(faults))
    assert len(faults) >= FAULTS_PER_S * SECONDS
    assert len(load.records) >= NUM_STREAMS
