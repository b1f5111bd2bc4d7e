"""The step loop: one thread runs every claimed stream, one token a step, and hands each step's results over at once.

A stream that replays emitted tokens computes many positions in a step; otherwise it is a stream like any other.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice

from decode_service.scheduler import Scheduler, Turn
from decode_service.stream import Emission, Ended, Stream
from isthmus.engine.engine import Engine
from isthmus.engine.runner import DecodeRow
from isthmus.engine.sampler import SamplingInput, sample
from isthmus.errors import NonFiniteLogits
from isthmus.log import get_logger
from isthmus.types import FinishReason, Token
from isthmus.worker_context import WorkerContext

IDLE_WAIT_S = 0.2
log = get_logger("decode.worker")
OnStep = Callable[[list[Emission]], None]
OnCrash = Callable[[BaseException], None]


class StepLoop:
    """Owns the streams it was given until it reports their end; calls `on_step` from its thread after every step.

    `on_crash`: it will do nothing more.
    """

    def __init__(self, engine: Engine, max_batch: int, context: WorkerContext, on_step: OnStep, on_crash: OnCrash):
        self._engine = engine
        self._scheduler = Scheduler(max_batch, self._note_run)
        self._on_step = on_step
        self._on_crash = on_crash
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
        stream.joined_at, stream.joined_at_step = self._context.clock.now(), self._context.progress.num_steps
        self._commands.put(partial(self._scheduler.join, stream))

    def leave(self, stream: Stream, why: Ended) -> None:
        """Ends a stream before the next step; a stream that has ended meanwhile is left alone."""
        self._commands.put(partial(self._end, [stream], why))

    def hand_over(self, stream: Stream, then: Callable[[bool], None]) -> None:
        """Takes the stream out between two steps; `then`, in the loop's thread, hears whether it was still here."""
        self._commands.put(lambda: then(self._scheduler.leave(stream)))

    @property
    def num_waiting(self) -> int:
        """Claimed streams without a place in the batch."""
        return self._scheduler.num_waiting

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception as error:
            log.exception("step_loop_failed", error)
            self._on_crash(error)

    def _step_until_stopped(self) -> None:
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
            self._on_step([Emission(stream, len(stream.token_ids), (), why) for stream in ended])

    def _step(self, batch: list[Turn]) -> list[Emission]:
        for stream, prefixes in batch:
            stream.grow(self._engine.pool, len(prefixes))
        sequences = [(stream, prefix) for stream, prefixes in batch for prefix in prefixes]
        try:
            rows = [_row(stream, prefix) for stream, prefix in sequences]
            logits = self._engine.runner.decode(rows, on_layer=lambda _: self._context.progress.layer_done())
            results = iter(sample(logits, [SamplingInput(stream.request, prefix) for stream, prefix in sequences]))
        except Exception as error:
            log.exception("step_failed", error, num_streams=len(batch))
            failure = Ended(FinishReason.ERROR, "INTERNAL", f"decode step failed: {type(error).__name__}")
            return [self._emission(stream, [failure]) for stream, _ in batch]
        return [self._emission(stream, islice(results, len(prefixes))) for stream, prefixes in batch]

    def _emission(self, stream: Stream, results: Iterable[Token | NonFiniteLogits | Ended]) -> Emission:
        index, ended = len(stream.token_ids), None
        for result in results:
            ended = ended or self._take(stream, result)  # every result is taken out, also what follows the end
        if ended:
            self._scheduler.leave(stream)
            stream.free(self._engine.pool)
        if index < len(stream.request.emitted_token_ids) <= len(stream.token_ids):
            self._note_replay(stream)
        return Emission(stream, index, stream.tokens[index:], ended)

    def _take(self, stream: Stream, result: Token | NonFiniteLogits | Ended) -> Ended | None:
        if isinstance(result, Token):
            return stream.accept(result, self._engine.context_length)
        if isinstance(result, NonFiniteLogits):
            return Ended(FinishReason.ERROR, result.reason, result.detail)
        return result

    def _note_run(self, stream: Stream) -> None:
        steps_waited = self._context.progress.num_steps - stream.joined_at_step
        stream.note(self._context.ledger, "stream.joined", steps_waited=steps_waited)

    def _note_replay(self, stream: Stream) -> None:
        num_tokens = len(stream.request.emitted_token_ids) - stream.num_claimed
        ms = round((self._context.clock.now() - stream.joined_at) * 1000, 1)
        stream.note(self._context.ledger, "stream.replayed", num_tokens=num_tokens, ms=ms)


def _row(stream: Stream, prefix: Sequence[int]) -> DecodeRow:
    """Computes the prefix's last token, and so the next one's logits."""
    return DecodeRow(prefix[-1], stream.num_prompt_tokens + len(prefix) - 1, stream.block_table)
