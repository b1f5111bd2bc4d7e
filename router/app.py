"""A router put together: model facts, registry view, sessions, admission, and what it shows of itself."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial

from isthmus.checkpoint.directory import Checkpoint
from isthmus.checkpoint.hub import model_name
from isthmus.clock import LoopClock, SystemClock
from isthmus.config import RouterConfig
from isthmus.failpoints import Failpoints
from isthmus.ids import SystemIds
from isthmus.ledger import Ledger
from isthmus.metrics import RequestMetrics
from isthmus.process.admin import Identity, ServiceHooks
from isthmus.process.health import HealthState, ProgressWatch
from isthmus.process.loop_driver import LoopDriver
from isthmus.process.rpc import PUBLIC_RECEIVE_BYTES, channel
from isthmus.process.serving import Face, Stop, serve_until_signal
from isthmus.text.text_threads import TextThreads
from isthmus.text.tokenizer import Tokenizer
from isthmus.v1 import admin_pb2
from kv_transfer.ownership.store import OpenStore, connected
from router.client.grpc_caller import SERVICE, Backend, InferenceServer
from router.client.opened_request import RequestOpener, count_request
from router.client.validate import ModelFacts
from router.life.locate import Locator
from router.life.parts import LifeParts
from router.life.request_life import Lives
from router.pool.admission import Admission
from router.pool.drivers import GrpcWorkerLinks, Registry
from router.pool.placement import Placement
from router.pool.worker_pool import WorkerPool

_POOL_CLOSE_S = 0.5


class Router:
    """The process's composition root; runs once."""

    def __init__(self, config: RouterConfig, open_store: OpenStore):
        self._config = config
        self._open_store = open_store
        self.identity = Identity(config.name, "router", SystemIds().incarnation())
        self._clock = SystemClock()
        self._health = HealthState(ProgressWatch(self._clock))
        self._ledger = Ledger(self._clock)
        self._metrics = RequestMetrics()
        self._admission = Admission(config.max_streams, config.max_queue)
        self._server = InferenceServer(config)
        self._pool: WorkerPool | None = None

    async def run(self) -> None:
        """Returns after a drain; raises CannotStart when a setting is in the way."""
        hooks = ServiceHooks(self._status, self._server.drain, self._ledger, self._metrics)
        face = Face(
            config=self._config,
            identity=self.identity,
            health=self._health,
            hooks=hooks,
            clock=self._clock,
            service=SERVICE,
            register=self._server.register,
            max_receive_bytes=PUBLIC_RECEIVE_BYTES,
        )
        await serve_until_signal(face, self._work)

    @contextlib.asynccontextmanager
    async def _work(self, stop: Stop) -> AsyncIterator[None]:
        """Opens everything in the order of need; the stack closes it in reverse. Serves with or without workers."""
        async with contextlib.AsyncExitStack() as stack:
            store = await stack.enter_async_context(connected(self._open_store, self._config, self._clock))
            model, tokenizer = await asyncio.to_thread(_open_model, self._config)
            text = stack.enter_context(
                TextThreads(tokenizer, max_prompt_bytes=self._config.max_prompt_bytes, max_tokens=model.context_length)
            )
            links = GrpcWorkerLinks(channel, self._clock)
            stack.push_async_callback(links.close)
            pool = WorkerPool(self.identity.incarnation, model.digest, links, self._ledger)
            self._pool = pool
            registry = Registry(store, self._clock)
            stack.push_async_callback(registry.close)
            await stack.enter_async_context(_watching(registry, pool, self._clock, stop))
            lives = Lives(
                LifeParts(
                    Placement(pool, self._admission),
                    self._ledger,
                    self._config.name,
                    self._config.queue_timeout_s,
                    Failpoints.parse(self._config.failpoints),
                ),
                self._admission,
                Locator(pool, registry),
                RequestOpener(model, tokenizer.detokenizer, SystemIds()),
                drive=partial(LoopDriver, clock=self._clock, on_failure=stop.request),
                on_end=partial(count_request, self._metrics),
            )
            self._server.backend = Backend(lives, model, text, self._clock)
            self._health.ready()
            yield

    def _status(self) -> admin_pb2.GetStatusResponse:
        return admin_pb2.GetStatusResponse(
            model=self._config.model,
            num_streams=self._server.num_streams,
            num_queued=self._admission.num_queued,
            workers=self._pool.status(self._clock.now()) if self._pool else [],
        )


def _open_model(config: RouterConfig) -> tuple[ModelFacts, Tokenizer]:
    """Reads every weight file for its digest."""
    checkpoint = Checkpoint.open(config.model, config.context_length)
    facts = ModelFacts(
        model_id=model_name(config.model),
        architecture=checkpoint.config.model_type,
        digest=checkpoint.digest,
        vocab_size=checkpoint.config.vocab_size,
        context_length=checkpoint.config.context_length,
        eos_token_ids=checkpoint.eos_token_ids,
    )
    return facts, Tokenizer.open(checkpoint.path)


@contextlib.asynccontextmanager
async def _watching(registry: Registry, pool: WorkerPool, clock: LoopClock, stop: Stop) -> AsyncIterator[None]:
    """The registry's watch; should it fail, the process ends rather than serve from an old view."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            stop.request(error)

    watching = asyncio.create_task(registry.watch(pool), name="worker-pool")
    watching.add_done_callback(ended)
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait({watching}, timeout=_POOL_CLOSE_S)
        pool.close(clock.now())
