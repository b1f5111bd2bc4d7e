"""The prefill loop: one thread that computes prompts tile by tile, publishes layer by layer and samples token 0."""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial

from isthmus.convert import finish_reason_to_proto, token_to_proto
from isthmus.errors import DeadlinePassed, IsthmusError, NoFreeBlocks, NonFiniteLogits, Overloaded, RequestCancelled
from isthmus.log import get_logger
from isthmus.process.worker_context import WorkerContext
from isthmus.steps import TILE, PrefillChunk, SamplingInput, StepResult
from isthmus.text.finish import finish_reason
from isthmus.v1 import prefill_pb2
from isthmus.worker.engine_port import PrefillEngine
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.sender import Sender
from prefill_service.publish import Abandoned, publish_rows, send_cached_prefix
from prefill_service.scheduler import plan
from prefill_service.sequence import Chunk, Sequence

MAX_SEQUENCES = 256
MAX_RUNNING = 32
IDLE_WAIT_S = 0.2
BLOCKED_WAIT_S = 0.005  # nothing to compute, but prompts wait for blocks that transfers still read
log = get_logger("prefill.worker")
Response = prefill_pb2.PrefillResponse


class PrefillLoop:
    """Owns every submitted sequence until it emitted Done or an error. `on_crash`: it will do nothing more."""

    def __init__(
        self,
        engine: PrefillEngine,
        sender: Sender,
        context: WorkerContext,
        tile_budget: int,
        on_crash: Callable[[BaseException], None],
    ):
        self._engine = engine
        self._sender = sender
        self._tile_budget = tile_budget
        self._on_crash = on_crash
        self._context = context
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._inbox: queue.Queue[Sequence | None] = queue.Queue(MAX_SEQUENCES)
        self._thread = threading.Thread(target=self._run, name="prefill-step", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the loop after the current step; sequences still here get RequestCancelled."""
        self._inbox.put(None, timeout=timeout_s)
        self._thread.join(timeout_s)

    def submit(self, sequence: Sequence) -> None:
        """Raises Overloaded at the bound."""
        if self.num_queued >= MAX_SEQUENCES:
            raise Overloaded("this prefill worker has all the prompts it takes", retry_after_s=0.1)
        self._inbox.put_nowait(sequence)

    @property
    def num_queued(self) -> int:
        return self._inbox.qsize() + len(self._waiting) + len(self._running)

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception as error:
            log.exception("prefill_loop_failed", error)
            self._on_crash(error)

    def _step_until_stopped(self) -> None:
        while self._take_submissions():
            self._drop_stopped()
            self._admit()
            chunks = plan(self._running, TILE, self._tile_budget)
            if not chunks:
                self._context.progress.idle()
                self._engine.check_device()  # transfers may have lost it; no step would ever tell
                continue
            self._context.progress.begin_work()
            self._step(chunks)
            self._context.progress.step_done()
        for sequence in self._waiting + self._running:
            self._end(sequence, RequestCancelled("the prefill worker stops"))

    def _take_submissions(self) -> bool:
        """Takes every waiting submission; waits only when there is nothing to compute. False: stop."""
        timeout_s = BLOCKED_WAIT_S if self._waiting else IDLE_WAIT_S
        try:
            submitted = self._inbox.get(block=not self._running, timeout=timeout_s)
            while submitted is not None:
                self._waiting.append(submitted)
                submitted = self._inbox.get_nowait()
        except queue.Empty:
            return True
        return False

    def _drop_stopped(self) -> None:
        now = self._context.clock.now()
        for sequence in [s for s in self._waiting + self._running if s.must_stop(now)]:
            self._publish_prompt_blocks(sequence)  # it may come again, for another decode worker
            if sequence.is_cancelled:
                self._end(sequence, RequestCancelled("cancelled"))
            else:
                self._end(sequence, DeadlinePassed("the deadline passed during prefill"))

    def _admit(self) -> None:
        """Gives blocks to waiting prompts, by priority then arrival, while there are any."""
        self._waiting.sort(key=lambda sequence: -sequence.request.priority)  # stable: arrival order within a priority
        while self._waiting and len(self._running) < MAX_RUNNING:
            try:
                self._take_blocks(self._waiting[0])
            except NoFreeBlocks:
                return
            sequence = self._waiting.pop(0)
            self._running.append(sequence)
            self._open_transfer(sequence)
            request_id, num_cached = sequence.request.request_id, sequence.num_cached_tokens
            self._context.ledger.record("prefill.started", request_id=request_id, cached=num_cached)

    def _take_blocks(self, sequence: Sequence) -> None:
        """At least the last prompt token is computed: its logits give token 0."""
        pool, prompt = self._engine.pool, sequence.request.prompt_token_ids
        cached = self._engine.match_prompt(prompt[:-1], sequence.request.tenant)
        try:
            fresh = pool.allocate(self._engine.layout.num_blocks(len(prompt)) - len(cached))
        except NoFreeBlocks:
            pool.release(cached)
            raise
        sequence.block_table = cached + fresh
        sequence.num_cached_tokens = sequence.num_computed_tokens = len(cached) * pool.block_size

    def _open_transfer(self, sequence: Sequence) -> None:
        if sequence.target is None:
            return
        blocks, request_id = list(sequence.block_table), sequence.request.request_id
        self._engine.pool.begin_drain(blocks)  # until the transfer is done its sends may read these blocks

        def on_done(outcome: TransferOutcome) -> None:
            self._engine.pool.end_drain(blocks)
            self._context.failpoints.hit("prefill.before_done")
            sequence.emit(Response(done=_done(sequence, outcome)))

        try:
            sequence.transfer = self._sender.open(sequence.target, blocks, on_done, request_id=request_id)
        except IsthmusError as error:
            self._engine.pool.end_drain(blocks)
            self._end(sequence, error)
            return
        send_cached_prefix(sequence, self._engine.layout)

    def _step(self, chunks: list[Chunk]) -> None:
        try:
            self._context.failpoints.hit("prefill.step")
            ended = [chunk.sequence for chunk in chunks if chunk.ends_prompt]
            for sequence, result in zip(ended, self._compute(chunks), strict=True):
                self._finish(sequence, result)
        except Abandoned:
            return  # the next turn of the loop ends those that stopped; the others are computed again
        except Exception as error:
            log.exception("step_failed", error, num_sequences=len(chunks))
            self._engine.check_device()  # lost: the process ends, and its prompts are computed elsewhere
            for sequence in [chunk.sequence for chunk in chunks if chunk.sequence in self._running]:
                self._end(sequence, IsthmusError(f"prefill step failed: {type(error).__name__}"))

    def _compute(self, chunks: list[Chunk]) -> list[StepResult]:
        """Token 0 of the prompts that end in this step. Raises Abandoned."""
        begin_ns = time.monotonic_ns()
        for sequence in [chunk.sequence for chunk in chunks if not chunk.sequence.first_tile_ns]:
            sequence.first_tile_ns = begin_ns
            self._report_progress(sequence)
        inputs = [
            PrefillChunk(chunk.token_ids, chunk.start, chunk.sequence.block_table, needs_logits=chunk.ends_prompt)
            for chunk in chunks
        ]
        sampling = [SamplingInput(chunk.sequence.request, ()) for chunk in chunks if chunk.ends_prompt]
        on_stored = partial(publish_rows, chunks, self._engine.layout, self._context)
        results = self._engine.compute(inputs, sampling, on_stored)
        end_ns = time.monotonic_ns()
        for chunk in chunks:
            self._account(chunk, begin_ns, end_ns)
        return results

    def _account(self, chunk: Chunk, begin_ns: int, end_ns: int) -> None:
        sequence, start, num_tokens = chunk
        sequence.last_tile_ns = end_ns
        sequence.num_computed_tokens += num_tokens
        ms, request_id = round((end_ns - begin_ns) / 1e6, 2), sequence.request.request_id
        self._context.ledger.record("prefill.tile", request_id=request_id, start=start, num_tokens=num_tokens, ms=ms)
        if not chunk.ends_prompt:
            self._report_progress(sequence)

    def _report_progress(self, sequence: Sequence) -> None:
        sequence.emit(Response(progress=prefill_pb2.Progress(num_computed_tokens=sequence.num_computed_tokens)))

    def _finish(self, sequence: Sequence, result: StepResult) -> None:
        """Token 0 goes straight back; decode gets the commit, or the news that it is not needed."""
        if sequence.must_stop(self._context.clock.now()):
            return  # its last rows were not sent; the next turn of the loop ends it
        if isinstance(result, NonFiniteLogits):
            self._end(sequence, result)
            return
        reason = finish_reason(sequence.request, [result.id], self._engine.context_length)
        first = prefill_pb2.FirstToken(token=token_to_proto(result), num_cached_tokens=sequence.num_cached_tokens)
        if reason is not None:
            first.finish_reason = finish_reason_to_proto(reason)
        self._context.failpoints.hit("prefill.before_first_token")
        sequence.emit(Response(first_token=first))
        self._context.ledger.record("prefill.first_token", request_id=sequence.request.request_id)
        self._publish_prompt_blocks(sequence)
        self._context.failpoints.hit("prefill.before_commit")
        if sequence.transfer is None:
            self._context.failpoints.hit("prefill.before_done")
            sequence.emit(Response(done=prefill_pb2.Done(acked=True, prefill_ms=sequence.prefill_ms)))
        elif reason is None:
            sequence.transfer.commit(result)
        else:
            sequence.transfer.abort("finished at token 0", finished=True)
        self._forget(sequence)

    def _publish_prompt_blocks(self, sequence: Sequence) -> None:
        """What is computed is kept, by content, for as long as nothing newer needs the room."""
        computed = sequence.request.prompt_token_ids[: sequence.num_computed_tokens]
        self._engine.publish_prompt(computed, sequence.block_table, sequence.request.tenant)

    def _end(self, sequence: Sequence, error: IsthmusError) -> None:
        """The error is what the caller sees; the transfer's Done, if one follows, comes too late to matter."""
        sequence.emit(error)
        if sequence.transfer is not None:
            sequence.transfer.abort(error.reason)
        self._context.ledger.record("prefill.ended", request_id=sequence.request.request_id, cause=error.reason)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        blocks, sequence.block_table = sequence.block_table, []
        self._engine.pool.release(blocks)


def _done(sequence: Sequence, outcome: TransferOutcome) -> prefill_pb2.Done:
    exposed_ns = max(0, (outcome.last_ack_ns or 0) - sequence.last_tile_ns)
    return prefill_pb2.Done(
        acked=outcome.acked,
        failure=outcome.failure,
        prefill_ms=sequence.prefill_ms,
        transfer_exposed_ms=exposed_ns / 1e6,
        transfer_bytes=outcome.bytes,
        transfer_blocks=outcome.blocks,
        transfer_frames=outcome.frames,
    )
