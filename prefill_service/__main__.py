"""`python -m prefill_service`: one prefill worker."""

import sys

from isthmus.clock import SystemClock
from isthmus.config import PrefillConfig
from isthmus.ids import SystemIds
from isthmus.process.serving import run_service
from kv_transfer.ownership.redis import RedisOwnership
from prefill_service.app import prefill_worker


async def main(config: PrefillConfig) -> None:
    await prefill_worker(config, RedisOwnership, clock=SystemClock(), ids=SystemIds()).run()


sys.setswitchinterval(5e-4)  # the sender wakes while a layer computes
sys.exit(run_service(PrefillConfig, main))
