"""`python -m prefill_service`: one prefill worker."""

import sys

from isthmus.config import PrefillConfig
from isthmus.process.serving import run_service
from kv_transfer.ownership.redis import RedisOwnership
from prefill_service.app import PrefillWorker

sys.setswitchinterval(5e-4)  # the sender wakes while a layer computes
sys.exit(run_service(PrefillConfig, lambda config: PrefillWorker(config, RedisOwnership).run()))
