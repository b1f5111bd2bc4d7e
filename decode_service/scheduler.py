"""Continuous batching, pure: a new stream joins at the next step, an ended one leaves at once."""

from collections.abc import Iterator, Mapping

from decode_service.step_messages import JoinBatch
from decode_service.stream_run import StreamRun
from decode_service.work import Ahead, Work, next_work

# A step computes at most this many rows beyond one for each stream, so that running streams keep their pace.
MAX_EXTRA_ROWS = 64


class Scheduler:
    """Runs in the order of their arrival: at most `max_batch` have a place, the rest wait for one.

    Owner: the step loop. Keys are transfer ids, of which each reservation has one of its own.
    """

    def __init__(self, max_batch: int):
        self._max_batch = max_batch
        self._running: dict[str, StreamRun] = {}
        self._waiting: dict[str, JoinBatch] = {}

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def __iter__(self) -> Iterator[StreamRun]:
        yield from self._running.values()
        for join in self._waiting.values():
            yield join.run

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def join(self, join: JoinBatch) -> None:
        self._waiting[join.run.transfer_id] = join

    def leave(self, transfer_id: str) -> StreamRun | None:
        """The run that was here, which is no longer; None when there is none."""
        run = self._running.pop(transfer_id, None)
        if run is not None:
            return run
        join = self._waiting.pop(transfer_id, None)
        return None if join is None else join.run

    def admit(self) -> list[JoinBatch]:
        """Gives the free places to those that wait, the oldest first; who got one."""
        admitted: list[JoinBatch] = []
        while self._waiting and len(self._running) < self._max_batch:
            transfer_id = next(iter(self._waiting))
            join = self._waiting.pop(transfer_id)
            self._running[transfer_id] = join.run
            admitted.append(join)
        return admitted

    def works(self, ahead: Mapping[str, Ahead]) -> list[Work]:
        """What the next step computes, behind the step that is under way. `ahead`: what that one adds, by transfer id.

        The first stream that replays replays the most.
        """
        works: list[Work] = []
        num_extra = MAX_EXTRA_ROWS
        for transfer_id, run in self._running.items():
            work = next_work(run, num_extra, ahead.get(transfer_id))
            if work is not None:
                num_extra -= work.num_rows - 1
                works.append(work)
        return works

    def find(self, transfer_id: str) -> StreamRun | None:
        """The run that is here by this transfer."""
        join = self._waiting.get(transfer_id)
        return self._running.get(transfer_id) if join is None else join.run

    def expired(self, now: float) -> list[StreamRun]:
        return [run for run in self if run.deadline is not None and run.deadline <= now]
