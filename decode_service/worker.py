"""The step loop: one thread runs every claimed stream, one token a step, and hands each step's results over at once."""

import queue
import threading
from collections.abc import Callable
from functools import partial

from decode_service.scheduler import Scheduler
from decode_service.stream import Emission, Ended, Phase, Stream
from isthmus.engine.engine import Engine
from isthmus.engine.runner import DecodeRow
from isthmus.engine.sampler import SamplingInput, sample
from isthmus.errors import NonFiniteLogits
from isthmus.log import get_logger
from isthmus.stopping import finish_reason
from isthmus.types import FinishReason, Token
from isthmus.worker_context import WorkerContext

IDLE_WAIT_S = 0.2
log = get_logger("decode.worker")


class StepLoop:
    """Owns the streams it was given until it reports their end; calls `on_step` from its thread after every step."""

    def __init__(
        self, engine: Engine, max_batch: int, context: WorkerContext, *, on_step: Callable[[list[Emission]], None]
    ):
        self._engine = engine
        self._scheduler = Scheduler(max_batch)
        self._on_step = on_step
        self._context = context
        # Bounded by the streams a worker admits: one join and a few leaves each. None: stop.
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="decode-step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the loop after the current step; streams still here are ended as cancelled."""
        self._commands.put(None)
        self._thread.join(timeout_s)

    def join(self, stream: Stream) -> None:
        self._commands.put(partial(self._scheduler.join, stream))

    def leave(self, stream: Stream, why: Ended) -> None:
        """Ends a stream before the next step; a stream that has ended meanwhile is left alone."""
        self._commands.put(partial(self._end, [stream], why))

    @property
    def num_waiting(self) -> int:
        """Claimed streams without a place in the batch."""
        return self._scheduler.num_waiting

    def _run(self) -> None:
        while self._take_commands():
            self._end_expired()
            batch = self._scheduler.batch()
            if not batch:
                self._context.progress.idle()
                continue
            self._context.progress.begin_work()
            self._context.failpoints.hit("decode.step")
            self._on_step(self._step(batch))
            self._context.progress.step_done()
        self._end(self._scheduler.streams(), Ended(FinishReason.CANCELLED, detail="worker stops"))

    def _take_commands(self) -> bool:
        """Follows every waiting command; waits for one only when there is nothing to run. False: stop."""
        try:
            command = self._commands.get(block=not len(self._scheduler), timeout=IDLE_WAIT_S)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _end_expired(self) -> None:
        self._end(self._scheduler.expired(self._context.clock.now()), Ended(FinishReason.DEADLINE))

    def _end(self, streams: list[Stream], why: Ended) -> None:
        ended = [stream for stream in streams if self._scheduler.leave(stream)]
        for stream in ended:
            stream.free(self._engine.pool)
        if ended:
            self._on_step([Emission(stream, len(stream.token_ids), None, why) for stream in ended])

    def _step(self, batch: list[Stream]) -> list[Emission]:
        for stream in batch:
            assert stream.phase is Phase.RUNNING, "only claimed streams are run"
            stream.grow(self._engine.pool)
        try:
            rows = [DecodeRow(stream.token_ids[-1], stream.next_position, stream.block_table) for stream in batch]
            logits = self._engine.runner.decode(rows, on_layer=lambda _: self._context.progress.layer_done())
            results = sample(logits, [SamplingInput(stream.request, stream.token_ids) for stream in batch])
        except Exception as error:
            log.exception("step_failed", error, num_streams=len(batch))
            failure = Ended(FinishReason.ERROR, "INTERNAL", f"decode step failed: {type(error).__name__}")
            return [self._emission(stream, failure) for stream in batch]
        return [self._emission(stream, result) for stream, result in zip(batch, results, strict=True)]

    def _emission(self, stream: Stream, result: Token | NonFiniteLogits | Ended) -> Emission:
        index = len(stream.token_ids)
        token = result if isinstance(result, Token) else None
        ended = result if isinstance(result, Ended) else None
        if isinstance(result, NonFiniteLogits):
            ended = Ended(FinishReason.ERROR, result.reason, result.detail)
        if token is not None:
            stream.append(token)
            reason = finish_reason(stream.request, stream.token_ids, self._engine.context_length)
            ended = Ended(reason) if reason else None
        if ended:
            self._scheduler.leave(stream)
            stream.free(self._engine.pool)
        return Emission(stream, index, token, ended)
