"""Prefill workers that follow a script, like the decode workers of `scripted_decode`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from isthmus.errors import IsthmusError, WorkerLost
from isthmus.v1 import prefill_pb2, types_pb2
from router.pool.decode_stream import Failed
from router.pool.worker_pool import PrefillListener
from tests.router.scripted_decode import EOS, Wires, script_token


@dataclass(eq=False)
class PrefillRun:
    """One call at a prefill worker, from its begin until it is over or dropped."""

    request: prefill_pb2.PrefillRequest
    listener: PrefillListener
    is_over: bool = False


@dataclass(eq=False)
class ScriptedPrefill:
    """Token 0, and a commit to the decode worker with the transfer. Written by itself; tests say how it behaves."""

    wires: Wires
    name: str
    incarnation: str
    address: str
    token: Callable[[types_pb2.EngineRequest, int], types_pb2.Token] = script_token
    fail: Callable[[int], IsthmusError | None] = lambda call: None  # by call number, before the first token
    crash: Callable[[int], IsthmusError | None] = lambda call: None  # the same, but with the prompt begun
    holds: bool = False  # the first token, until `release`
    commits: bool = True
    breaks_s: float | None = None  # after a commit, instead of Done
    compute_s: float = 0.0
    is_up: bool = True
    done: prefill_pb2.Done = field(
        default_factory=lambda: prefill_pb2.Done(
            acked=True,
            prefill_ms=3.0,
            transfer_exposed_ms=0.5,
            transfer_bytes=4096,
            transfer_blocks=2,
            transfer_frames=4,
        )
    )
    requests: list[prefill_pb2.PrefillRequest] = field(default_factory=list)
    runs: list[PrefillRun] = field(default_factory=list)
    num_cancelled: int = 0

    def begin(self, request: prefill_pb2.PrefillRequest, listener: PrefillListener) -> PrefillRun:
        """A call has come in."""
        run = PrefillRun(request, listener)
        if not self.is_up:
            self._fail(run, WorkerLost("the connection failed"))
            return run
        self.requests.append(request)
        self.runs.append(run)
        listener.take(prefill_pb2.PrefillResponse(queued=prefill_pb2.Queued(num_ahead=0)), self.wires.time.now())
        if (error := self.fail(len(self.requests))) is not None:
            self._fail(run, error)
        elif not self.holds:
            self.wires.time.after(self.compute_s, partial(self._compute, run))
        return run

    def drop(self, run: PrefillRun) -> None:
        """The caller has cancelled it."""
        if not run.is_over:
            self.num_cancelled += 1
            self._note_over(run)

    def release(self) -> None:
        self.holds = False
        for run in list(self.runs):
            self._compute(run)

    def lose(self, run: PrefillRun) -> None:
        """As if the worker had died of it."""
        if not run.is_over:
            self._fail(run, WorkerLost("crashed"))

    def go_down(self) -> None:
        self.is_up = False
        for run in list(self.runs):
            self._fail(run, WorkerLost("the connection failed"))

    def _compute(self, run: PrefillRun) -> None:
        if run.is_over:
            return
        request = run.request.request
        computed = prefill_pb2.Progress(num_computed_tokens=len(request.prompt_token_ids))
        run.listener.take(prefill_pb2.PrefillResponse(progress=computed), self.wires.time.now())
        if (error := self.crash(len(self.requests))) is not None:
            self._fail(run, error)
            return
        token = self.token(request, 0)
        reason = None
        if token.id == EOS:
            reason = types_pb2.FINISH_REASON_STOP
        elif request.sampling.max_tokens == 1:
            reason = types_pb2.FINISH_REASON_LENGTH
        first = prefill_pb2.FirstToken(token=token, finish_reason=reason, num_cached_tokens=5)
        run.listener.take(prefill_pb2.PrefillResponse(first_token=first), self.wires.time.now())
        self.wires.time.after(self.wires.latency_s(), partial(self._transfer, run, is_finished=reason is not None))

    def _transfer(self, run: PrefillRun, *, is_finished: bool) -> None:
        if run.is_over:
            return
        done = prefill_pb2.Done()
        done.CopyFrom(self.done)
        target = run.request.target
        if is_finished:
            self.wires.abort(target.transfer_id)
        elif self.commits and not self.wires.commit(target.transfer_id, target.attempt):
            done.acked = False
            done.failure = "no such transfer"
        elif self.breaks_s is not None:
            self.wires.time.after(self.breaks_s, partial(self.lose, run))
            return
        self._note_over(run)
        run.listener.take(prefill_pb2.PrefillResponse(done=done), self.wires.time.now())

    def _fail(self, run: PrefillRun, error: IsthmusError) -> None:
        self._note_over(run)
        run.listener.failed(Failed(error), self.wires.time.now())

    def _note_over(self, run: PrefillRun) -> None:
        run.is_over = True
        if run in self.runs:
            self.runs.remove(run)
