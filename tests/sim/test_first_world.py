"""The real cores of all services in one simulated world, seed after seed. A seed that fails replays:

SIM_FIRST=SEED SIM_SEEDS=1 python -m pytest tests/sim
"""

import os

from tests.sim.first_world import FirstWorld

FIRST = int(os.environ.get("SIM_FIRST", "0"))
NUM_SEEDS = int(os.environ.get("SIM_SEEDS", "500"))


def test_every_stream_is_whole_whatever_the_seed() -> None:
    for seed in range(FIRST, FIRST + NUM_SEEDS):
        try:
            FirstWorld(seed).run()
        except BaseException as error:
            raise AssertionError(f"seed {seed}: SIM_FIRST={seed} SIM_SEEDS=1 replays it") from error


def test_a_seed_gives_the_same_run_again() -> None:
    stories = []
    for _ in range(2):
        world = FirstWorld(7)
        world.run()
        events = [(e.monotonic_ns, e.event, e.request_id) for e in world.processes["router-0"].ledger.read()]
        stories.append((world.time.now(), [client.token_ids for client in world.clients], events))
    assert stories[0] == stories[1]
