"""`python -m decode_service`: one decode worker."""

import sys

from decode_service.app import DecodeWorker
from isthmus.config import DecodeConfig
from isthmus.process.serving import run_service
from kv_transfer.ownership.redis import RedisOwnership

sys.setswitchinterval(5e-4)  # the receiver and the step loop wake within a millisecond of each other
sys.exit(run_service(DecodeConfig, lambda config: DecodeWorker(config, RedisOwnership).run()))
