"""A prefill loop on the bundled model with a real sender, and decode sides that take what it sends."""

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from isthmus.clock import SystemClock
from isthmus.config import PrefillConfig
from isthmus.engine.engine import Engine
from isthmus.errors import IsthmusError
from isthmus.failpoints import Failpoints
from isthmus.ids import SystemIds
from isthmus.kv.block_pool import BlockPool
from isthmus.ledger import LedgerEvent
from isthmus.process.worker_context import WorkerContext
from isthmus.types import Extent, Request, SamplingParams, TransferTarget
from isthmus.worker.engine_start import transfer_memory
from isthmus.worker.instruments import Instruments
from isthmus.worker.step_thread import StepThread
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.sender import Sender
from kv_transfer.sender_options import SenderOptions
from prefill_service.ports import LoopPorts
from prefill_service.prefill_loop import PrefillLoop
from prefill_service.prompt import Event, Prompt
from prefill_service.submissions import Submissions
from tests.engine.engines import bundled_engine, prompt
from tests.kv_transfer.world import POISON, DecodeSide, Pool

NUM_LANDING_BLOCKS = 160
IDLE_WAIT_S = 0.2


class AtLayer(Failpoints):
    """Runs an action when the n-th layer of the process is stored; counts the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.num_layers = 0
        self.actions: dict[int, Callable[[], None]] = {}

    def hit(self, name: str) -> str | None:
        if name == "prefill.layer":
            self.num_layers += 1
            self.actions.pop(self.num_layers, lambda: None)()
        return None


@dataclass(eq=False)
class Submitted:
    """One prompt in the loop and everything it said."""

    prompt: Prompt
    events: "queue.SimpleQueue[Event]"
    said: list[Event] = field(default_factory=list)

    def next(self, timeout_s: float = 20.0) -> Event:
        event = self.events.get(timeout=timeout_s)
        self.said.append(event)
        return event

    def until(self, kind: str) -> Any:
        """The first event of a kind, `error` included."""
        while True:
            event = self.next()
            if isinstance(event, IsthmusError):
                assert kind == "error", repr(event)
                return event
            if event.WhichOneof("event") == kind:
                return getattr(event, kind)

    def progress(self) -> list[int]:
        messages = [event for event in self.said if not isinstance(event, IsthmusError)]
        return [event.progress.num_computed_tokens for event in messages if event.HasField("progress")]


class Prefill:
    """The loop and what it works with; its pool of blocks is its own, the engine's tensors are shared."""

    def __init__(self, failpoints: Failpoints, tile_budget: int, ack_timeout_s: float):
        whole = bundled_engine()
        self.engine: Engine = replace(whole, pool=BlockPool(whole.pool.num_blocks, whole.pool.block_size))
        self.context = replace(WorkerContext.create(PrefillConfig(), SystemClock(), SystemIds()), failpoints=failpoints)
        options = SenderOptions(ack_timeout_s=ack_timeout_s, failpoints=failpoints)
        memory = PoolMemory(self.engine.layout, transfer_memory(self.engine))
        self.sender = Sender(
            self.context.identity.incarnation, memory, self.context.ledger, self.context.clock, options=options
        ).start()
        self.crashes: list[BaseException] = []
        clock = self.context.clock
        instruments = Instruments(self.context.ledger, failpoints, self.context.progress)
        loop = PrefillLoop(LoopPorts(self.engine, self.sender, clock.now, instruments), tile_budget)
        self.thread = StepThread("prefill-step", clock, idle_wait_s=IDLE_WAIT_S, on_crash=self.crashes.append)
        self.submissions = Submissions(self.engine, loop, self.thread.add(loop))

    def submit(self, token_ids: list[int], target: TransferTarget | None, **fields: Any) -> Submitted:
        sampling = SamplingParams(max_tokens=1 if target is None else 8, ignore_eos=True)
        request = Request(f"request-{len(token_ids)}", 1, tuple(token_ids), sampling, **fields)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        submitted = Submitted(Prompt(request=request, target=target, emit=events.put, deadline=None), events)
        self.submissions.submit(submitted.prompt)
        return submitted

    def recorded(self, event: str) -> list[LedgerEvent]:
        return [entry for entry in self.context.ledger.read() if entry.event == event]


@contextmanager
def prefilling(
    failpoints: Failpoints | None = None, *, tile_budget: int = 256, ack_timeout_s: float = 5.0, start: bool = True
) -> Iterator[Prefill]:
    """Without `start` the test starts the thread, so that what it submitted before is in one step."""
    prefill = Prefill(failpoints or Failpoints(), tile_budget, ack_timeout_s)
    if start:
        prefill.thread.start()
    try:
        yield prefill
    finally:
        prefill.thread.stop()
        prefill.sender.close()


@contextmanager
def decoding() -> Iterator[DecodeSide]:
    layout = bundled_engine().layout
    with DecodeSide(pool=Pool(POISON, layout=layout, num_blocks=NUM_LANDING_BLOCKS)) as side:
        yield side


def reserve(side: DecodeSide, first_block: int, num_tokens: int) -> TransferTarget:
    """Room for a prompt from `first_block` on, of which nothing is there yet."""
    layout = side.pool.layout
    table = list(range(first_block, first_block + layout.num_blocks(num_tokens)))
    missing = [Extent("latent", layer, 0, num_tokens) for layer in range(layout.planes[0].num_layers)]
    return side.reserve(table, tuple(missing))


def landed(side: DecodeSide, first_block: int, num_tokens: int) -> "np.ndarray[Any, Any]":
    """[layers, tokens, bytes] as they arrived."""
    first = first_block * side.pool.layout.block_size
    rows = [side.pool.rows[place][first : first + num_tokens] for place in sorted(side.pool.rows)]
    return np.stack(rows)


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    with decoding() as side:
        yield side


__all__ = ["AtLayer", "Prefill", "Submitted", "decoding", "landed", "prefilling", "prompt", "reserve"]
