"""`python -m router`: one router."""

import sys

from isthmus.config import RouterConfig
from isthmus.process.serving import run_service
from kv_transfer.ownership.redis import RedisOwnership
from router.app import Router

sys.exit(run_service(RouterConfig, lambda config: Router(config, RedisOwnership).run()))
