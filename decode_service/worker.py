"""The step loop: one thread runs every claimed stream, one token a step, and hands each step's results over at once.

A stream that replays emitted tokens computes many positions in a step; otherwise it is a stream like any other.
Where the engine's decoder runs ahead, a step is launched before the results of the one before are taken. What of it
belongs to streams that have ended meanwhile is dropped, and their blocks are held until its results were taken.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice, repeat

from decode_service.scheduler import NOTHING, Scheduler, Turn
from decode_service.stream import Emission, Ended, Phase, Stream, UnderWay
from isthmus.errors import NonFiniteLogits
from isthmus.log import get_logger
from isthmus.process.worker_context import WorkerContext
from isthmus.steps import FinishedStep, FromPrevious, PendingStep, needs_its_tokens
from isthmus.text.finish import is_full
from isthmus.types import FinishReason, Token
from isthmus.worker.engine_port import DecodeEngine

IDLE_WAIT_S = 0.2
log = get_logger("decode.worker")
OnStep = Callable[[list[Emission]], None]
OnCrash = Callable[[BaseException], None]


@dataclass(eq=False, slots=True)
class _Step:
    """Submitted, results not taken yet."""

    batch: list[Turn]
    pending: PendingStep
    may_be_followed: bool  # by another step before its results are taken
    under_way: dict[Stream, UnderWay]
    draining: list[list[int]] = field(default_factory=list[list[int]])  # blocks of streams that ended: it uses them


class StepLoop:
    """Owns the streams it was given until it reports their end; calls `on_step` from its thread after every step.

    `on_crash`: it will do nothing more.
    """

    def __init__(
        self, engine: DecodeEngine, max_batch: int, context: WorkerContext, on_step: OnStep, on_crash: OnCrash
    ):
        self._engine = engine
        self._scheduler = Scheduler(max_batch, self._note_run)
        self._on_step = on_step
        self._on_crash = on_crash
        self._context = context
        self._pending: deque[_Step] = deque()  # between two turns of the loop one at most
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
        self._commands.put(partial(self._hand_over, stream, then))

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
            step = self._launch()
            self._settle(all_but=1 if step is not None and step.may_be_followed else 0)
            if step is None:
                self._context.progress.idle()
                self._engine.check_device()  # transfers may have lost it; no step would ever tell
        self._settle()
        self._end(self._scheduler.streams(), Ended(FinishReason.CANCELLED, detail="worker stops"))

    def _take_commands(self) -> bool:
        """Follows every waiting command; waits for one only when there is nothing to run. False: stop."""
        try:
            command = self._commands.get(block=not (self._pending or len(self._scheduler)), timeout=IDLE_WAIT_S)
            while command is not None:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return True
        return False

    def _end_expired(self) -> None:
        self._end(self._scheduler.expired(self._context.clock.now()), Ended(FinishReason.DEADLINE))

    def _hand_over(self, stream: Stream, then: Callable[[bool], None]) -> None:
        self._settle()  # who takes it over gets every token, and no step writes its blocks any more
        then(self._scheduler.leave(stream))

    def _end(self, streams: list[Stream], why: Ended) -> None:
        ended = [stream for stream in streams if self._scheduler.leave(stream)]
        for stream in ended:
            self._free(stream)
        if ended:
            self._on_step([Emission(stream, len(stream.token_ids), (), why) for stream in ended])

    def _free(self, stream: Stream) -> None:
        if self._pending and stream in (step := self._pending[-1]).under_way:
            self._engine.pool.begin_drain(stream.block_table)
            step.draining.append(stream.block_table)
        stream.free(self._engine.pool)

    def _launch(self) -> _Step | None:
        """Submits the next step, behind the one that may be pending. None: nothing is to be computed."""
        under_way = self._pending[-1].under_way if self._pending else NOTHING
        batch = [turn for turn in self._scheduler.batch(under_way) if not self._is_over(turn)]
        if not batch:
            return None
        self._context.progress.begin_work()
        self._context.failpoints.hit("decode.step")
        for stream, rows in batch:
            stream.grow(self._engine.pool, rows[-1][0].position + 1)
        self._pending.append(self._submit(batch))
        return self._pending[-1]

    def _submit(self, batch: list[Turn]) -> _Step:
        rows, sampling = zip(*(row for _, rows in batch for row in rows), strict=True)
        decoder = self._engine.decoder
        may_be_followed = decoder.runs_ahead and not any(needs_its_tokens(s.request.sampling) for s, _ in batch)
        try:
            pending = decoder.submit(rows, sampling, lambda *_: self._context.progress.layer_done())
        except Exception as error:  # noqa: BLE001 - its results raise it, after those of the step before
            pending, may_be_followed = FinishedStep(error), False
        return _Step(batch, pending, may_be_followed, _under_way(batch))

    def _is_over(self, turn: Turn) -> bool:
        """Whether tokens under way are certain to end the stream: it gets no row beyond its last token."""
        stream, rows = turn
        num_tokens = rows[0][0].position + 1 - stream.num_prompt_tokens
        return is_full(stream.request, num_tokens, self._engine.context_length)

    def _settle(self, *, all_but: int = 0) -> None:
        """Takes the results of pending steps, the oldest first, and hands them over."""
        while len(self._pending) > all_but:
            step = self._pending.popleft()
            results = self._results(step)
            parts = [(stream, list(islice(results, len(rows)))) for stream, rows in step.batch]
            # Who ended before this step's results came has nothing of them.
            emissions = [self._emission(stream, part) for stream, part in parts if stream.phase is not Phase.ENDED]
            for block_table in step.draining:
                self._engine.pool.end_drain(block_table)
            if emissions:
                self._on_step(emissions)
            self._context.progress.step_done()

    def _results(self, step: _Step) -> Iterator[Token | NonFiniteLogits | Ended]:
        try:
            return iter(step.pending.results())
        except Exception as error:
            log.exception("step_failed", error, num_streams=len(step.batch))
            self._engine.check_device()  # lost: the process ends, and its streams go on elsewhere
            return repeat(Ended(FinishReason.ERROR, "INTERNAL", f"decode step failed: {type(error).__name__}"))

    def _emission(self, stream: Stream, results: Iterable[Token | NonFiniteLogits | Ended]) -> Emission:
        index, ended = len(stream.token_ids), None
        for result in results:
            ended = ended or self._take(stream, result)  # every result is taken out, also what follows the end
        if ended:
            self._scheduler.leave(stream)
            self._free(stream)
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


def _under_way(batch: list[Turn]) -> dict[Stream, UnderWay]:
    ends = accumulate(len(rows) for _, rows in batch)
    return {stream: UnderWay(len(rows), FromPrevious(end - 1)) for (stream, rows), end in zip(batch, ends, strict=True)}
