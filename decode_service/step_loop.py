"""The decode loop: runs every claimed stream, step by step, and hands each step's results over at once.

Where the engine's decoder runs ahead, a step is launched before the results of the one before are taken. What of it
belongs to streams that have ended meanwhile is dropped, and their blocks are held until its results were taken.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from decode_service.scheduler import Scheduler
from decode_service.step_messages import Emission, HandedOver, HandOver, JoinBatch, LeaveBatch, StepCommand
from decode_service.stream_run import Ended, Settled, StreamRun
from decode_service.work import Ahead, Work
from isthmus.log import get_logger
from isthmus.steps import FinishedStep, PendingStep, SamplingInput, StepResult, StepRow
from isthmus.types import FinishReason
from isthmus.worker.engine_port import DecodeEngine
from isthmus.worker.instruments import Instruments

log = get_logger("decode.step_loop")
OnStep = Callable[[Sequence[Emission]], None]
OnHandedOver = Callable[[HandedOver], None]
_NOTHING_AHEAD: Mapping[str, Ahead] = {}


@dataclass(eq=False, slots=True)
class _Step:
    """Submitted, its results not taken yet. Owner: the loop."""

    works: list[Work]
    pending: PendingStep
    may_be_followed: bool  # by another step before its results are taken
    draining: list[list[int]] = field(default_factory=list[list[int]], init=False)  # blocks it uses of ended streams

    def ahead(self) -> dict[str, Ahead]:
        """What it adds to each of its streams, by transfer id."""
        added: dict[str, Ahead] = {}
        first_row = 0
        for work in self.works:
            added[work.run.transfer_id] = work.ahead(first_row)
            first_row += work.num_rows
        return added

    def uses(self, run: StreamRun) -> bool:
        return any(work.run is run for work in self.works)


class DecodeLoop:
    """Owns the runs it was given until it hands them over or reports their end.

    Owner: the step thread, which is the only one to call it; any thread may read `num_waiting`. `on_step` hears what
    every step gave, `on_handed_over` the answers to HandOver, in the order in which things happened.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        max_batch: int,
        instruments: Instruments,
        on_step: OnStep,
        on_handed_over: OnHandedOver,
    ):
        self._engine = engine
        self._instruments = instruments
        self._progress = instruments.progress
        self._on_step = on_step
        self._on_handed_over = on_handed_over
        self._scheduler = Scheduler(max_batch)
        self._commands: deque[StepCommand] = deque()  # bounded by the streams a worker admits
        self._steps: deque[_Step] = deque()  # pending, the oldest first; between two turns one at most

    @property
    def num_waiting(self) -> int:
        """Claimed streams without a place in the batch."""
        return self._scheduler.num_waiting

    def take(self, command: StepCommand) -> None:
        self._commands.append(command)

    def turn(self, now: float) -> float | None:
        """One step, launched or computed. Returns `now` while there is more to do, None when there is nothing."""
        self._follow_commands()
        self._end_expired(now)
        self._admit()
        step = self._launch()
        self._settle(keep=1 if step is not None and step.may_be_followed else 0)
        if step is None:
            self._rest()
        return now if self._steps or len(self._scheduler) else None

    def close(self, now: float) -> None:
        """Streams that are still here end as cancelled."""
        self._follow_commands()
        self._settle()
        self._end(list(self._scheduler), Ended(FinishReason.CANCELLED, detail="worker stops"))

    def _follow_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            match command:
                case JoinBatch():
                    self._scheduler.join(command)
                case LeaveBatch():
                    run = self._scheduler.find(command.transfer_id)
                    self._end([] if run is None else [run], command.why)
                case HandOver():
                    self._settle()  # who takes it over gets every token, and no step writes its blocks any more
                    self._on_handed_over(HandedOver(command.ticket, self._scheduler.leave(command.transfer_id)))

    def _end_expired(self, now: float) -> None:
        self._end(self._scheduler.expired(now), Ended(FinishReason.DEADLINE))

    def _admit(self) -> None:
        for join in self._scheduler.admit():
            join.run.note_joined(self._instruments.ledger, self._progress.num_steps - join.at_step)

    def _launch(self) -> _Step | None:
        """Submits the next step, behind the one that may be pending. None: nothing is to be computed."""
        works = self._scheduler.works(self._steps[-1].ahead() if self._steps else _NOTHING_AHEAD)
        if not works:
            return None
        self._progress.begin_work()
        self._instruments.failpoints.hit("decode.step")
        for work in works:
            work.run.grow(self._engine.pool, work.num_positions)
        step = self._submit(works)
        self._steps.append(step)
        return step

    def _submit(self, works: list[Work]) -> _Step:
        rows: list[StepRow] = []
        sampling: list[SamplingInput] = []
        for work in works:
            for row, drawn_by in work.rows():
                rows.append(row)
                sampling.append(drawn_by)
        decoder = self._engine.decoder
        try:
            pending = decoder.submit(rows, sampling, self._note_stored)
        except Exception as error:  # noqa: BLE001 - its results raise it, after those of the step before
            return _Step(works, FinishedStep(error), may_be_followed=False)
        may_be_followed = decoder.runs_ahead and all(work.may_be_followed for work in works)
        return _Step(works, pending, may_be_followed)

    def _note_stored(self, _plane: str, _layer: int) -> None:
        self._progress.layer_done()

    def _settle(self, *, keep: int = 0) -> None:
        """Takes the results of pending steps, the oldest first, and hands them over; all but the newest `keep`."""
        while len(self._steps) > keep:
            step = self._steps.popleft()
            emissions = self._emissions(step, self._results(step))
            for block_table in step.draining:
                self._engine.pool.end_drain(block_table)
            if emissions:
                self._on_step(emissions)
            self._progress.step_done()

    def _results(self, step: _Step) -> Sequence[StepResult] | Ended:
        """One for each row; or why every stream of the step ends."""
        try:
            return step.pending.results()
        except Exception as error:
            log.exception("step_failed", error, num_streams=len(step.works))
            self._engine.check_device()  # lost: the process ends, and its streams go on elsewhere
            return Ended(FinishReason.ERROR, "INTERNAL", f"decode step failed: {type(error).__name__}")

    def _emissions(self, step: _Step, results: Sequence[StepResult] | Ended) -> list[Emission]:
        emissions: list[Emission] = []
        first_row = 0
        for work in step.works:
            end_row = first_row + work.num_rows
            if not work.run.is_freed:  # who ended before these results came has nothing of them
                index = len(work.run.token_ids)
                settled = (
                    Settled((), results) if isinstance(results, Ended) else work.settle(results[first_row:end_row])
                )
                if settled.ended is not None:
                    self._drop(work.run)
                emissions.append(Emission(work.run.transfer_id, index, settled.tokens, settled.ended))
            first_row = end_row
        return emissions

    def _end(self, runs: Sequence[StreamRun], why: Ended) -> None:
        for run in runs:
            self._drop(run)
        if runs:
            self._on_step([Emission(run.transfer_id, len(run.token_ids), (), why) for run in runs])

    def _drop(self, run: StreamRun) -> None:
        """Its blocks go back; those that the pending step uses, after that step."""
        self._scheduler.leave(run.transfer_id)
        if self._steps and self._steps[-1].uses(run):
            block_table = run.block_table
            self._engine.pool.begin_drain(block_table)
            self._steps[-1].draining.append(block_table)
        run.free(self._engine.pool)

    def _rest(self) -> None:
        self._progress.idle()
        self._engine.check_device()  # transfers may have lost it; no step would ever tell
