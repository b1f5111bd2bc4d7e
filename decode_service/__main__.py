"""`python -m decode_service`: one decode worker."""

import sys

from decode_service.app import decode_worker
from isthmus.clock import SystemClock
from isthmus.config import DecodeConfig
from isthmus.ids import SystemIds
from isthmus.process.serving import run_service
from kv_transfer.ownership.redis import RedisOwnership


async def main(config: DecodeConfig) -> None:
    await decode_worker(config, RedisOwnership, clock=SystemClock(), ids=SystemIds()).run()


sys.setswitchinterval(5e-4)  # the receiver and the step loop wake within a millisecond of each other
sys.exit(run_service(DecodeConfig, main))
