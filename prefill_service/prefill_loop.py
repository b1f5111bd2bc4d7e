"""The prefill loop: computes prompts tile by tile, publishes layer by layer and samples token 0.

A core: it has no thread, queue or clock. A `isthmus.worker.step_thread.StepThread` hands it commands and turns.
"""

from dataclasses import dataclass
from functools import partial

from isthmus.convert import finish_reason_to_proto, token_to_proto
from isthmus.errors import DeadlinePassed, IsthmusError, NoFreeBlocks, NonFiniteLogits, RequestCancelled
from isthmus.log import get_logger
from isthmus.steps import TILE, PrefillChunk, SamplingInput, StepResult
from isthmus.text.finish import finish_reason
from isthmus.v1 import prefill_pb2
from prefill_service.ports import LoopPorts
from prefill_service.prompt import Prompt, PromptChunk
from prefill_service.publish import Abandoned, publish_rows, send_cached_prefix, transfer_done
from prefill_service.scheduler import plan

MAX_RUNNING = 32
BLOCKED_WAIT_S = 0.005  # nothing to compute, but prompts wait for blocks that transfers still read
log = get_logger("prefill.prefill_loop")
Response = prefill_pb2.PrefillResponse


@dataclass(frozen=True, slots=True)
class SubmitPrompt:
    """The prompt is the loop's from now on."""

    prompt: Prompt


class PrefillLoop:
    """Owns every submitted prompt until it emitted Done or an error. Its driver's thread alone calls and writes it.

    Nothing here bounds the prompts: `prefill_service.submissions` does, before they are submitted.
    """

    def __init__(self, ports: LoopPorts, tile_budget: int):
        self._ports = ports
        self._engine = ports.engine
        self._instruments = ports.instruments
        self._tile_budget = tile_budget  # tokens of a step, at most
        self._waiting: list[Prompt] = []  # for blocks, or for a place among the running
        self._running: list[Prompt] = []
        self.num_ended = 0  # of all that were ever submitted; any thread may read it

    def take(self, command: SubmitPrompt) -> None:
        self._waiting.append(command.prompt)

    def turn(self, now: float) -> float | None:
        """One step, if there is something to compute. When the next turn is due: `StepLoop.turn` says how to read it.

        Raises what the engine raises when its device is lost.
        """
        self._end_stopped(now)
        self._admit()
        chunks = plan(self._running, TILE, self._tile_budget)
        if chunks:
            self._step(chunks)
            return now
        self._rest()
        return now + BLOCKED_WAIT_S if self._waiting else None

    def close(self, now: float) -> None:
        """Prompts still here get RequestCancelled."""
        for prompt in self._waiting + self._running:
            self._end(prompt, RequestCancelled("the prefill worker stops"))

    def _end_stopped(self, now: float) -> None:
        for prompt in [prompt for prompt in self._waiting + self._running if prompt.must_stop(now)]:
            self._publish_prompt_blocks(prompt)  # it may come again, for another decode worker
            if prompt.is_cancelled:
                self._end(prompt, RequestCancelled("cancelled"))
            else:
                self._end(prompt, DeadlinePassed("the deadline passed during prefill"))

    def _admit(self) -> None:
        """Gives blocks to waiting prompts, by priority then arrival, while there are any."""
        self._waiting.sort(key=lambda prompt: -prompt.request.priority)  # stable: arrival order within a priority
        while self._waiting and len(self._running) < MAX_RUNNING:
            try:
                self._take_blocks(self._waiting[0])
            except NoFreeBlocks:
                return
            prompt = self._waiting.pop(0)
            self._running.append(prompt)
            self._open_transfer(prompt)
            cached = prompt.num_cached_tokens
            self._instruments.ledger.record("prefill.started", request_id=prompt.request_id, cached=cached)

    def _take_blocks(self, prompt: Prompt) -> None:
        """At least the last prompt token is computed: its logits give token 0. Raises NoFreeBlocks."""
        pool = self._engine.pool
        token_ids = prompt.request.prompt_token_ids
        cached = self._engine.match_prompt(token_ids[:-1], prompt.request.tenant)
        try:
            fresh = pool.allocate(self._engine.layout.num_blocks(len(token_ids)) - len(cached))
        except NoFreeBlocks:
            pool.release(cached)
            raise
        prompt.take_blocks(cached + fresh, len(cached) * pool.block_size)

    def _open_transfer(self, prompt: Prompt) -> None:
        if prompt.target is None:
            return
        blocks = list(prompt.block_table)
        on_done = partial(transfer_done, prompt, blocks, self._ports)
        self._engine.pool.begin_drain(blocks)  # until the transfer is done its sends may read these blocks
        try:
            transfer = self._ports.sender.open(prompt.target, blocks, on_done, request_id=prompt.request_id)
        except IsthmusError as error:
            self._engine.pool.end_drain(blocks)
            self._end(prompt, error)
            return
        prompt.send_by(transfer)
        send_cached_prefix(prompt, self._engine.layout)

    def _step(self, chunks: list[PromptChunk]) -> None:
        """Computes them; whatever fails ends the prompts of this step and no others."""
        self._instruments.progress.begin_work()
        try:
            self._compute(chunks)
        except Abandoned:
            pass  # the next turn ends those that stopped; the others are computed again
        except Exception as error:
            log.exception("step_failed", error, num_prompts=len(chunks))
            self._engine.check_device()  # lost: the process ends, and its prompts are computed elsewhere
            for prompt in [chunk.prompt for chunk in chunks if chunk.prompt in self._running]:
                self._end(prompt, IsthmusError(f"prefill step failed: {type(error).__name__}"))
        self._instruments.progress.step_done()

    def _compute(self, chunks: list[PromptChunk]) -> None:
        """One pass, published layer by layer, and token 0 of the prompts that end in it. Raises Abandoned."""
        self._instruments.failpoints.hit("prefill.step")
        began_at = self._ports.now()
        for chunk in chunks:
            if chunk.prompt.begin_tile(began_at):
                self._report_progress(chunk.prompt)
        inputs = [_engine_chunk(chunk) for chunk in chunks]
        ended = [chunk.prompt for chunk in chunks if chunk.ends_prompt]
        sampling = [SamplingInput(prompt.request, ()) for prompt in ended]
        results = self._engine.compute(inputs, sampling, partial(publish_rows, chunks, self._ports))
        ended_at = self._ports.now()
        for chunk in chunks:
            self._account(chunk, began_at, ended_at)
        for prompt, result in zip(ended, results, strict=True):
            self._finish(prompt, result, ended_at)

    def _rest(self) -> None:
        """Nothing can be computed."""
        self._instruments.progress.idle()
        self._engine.check_device()  # transfers may have lost it; no step would ever tell

    def _account(self, chunk: PromptChunk, began_at: float, ended_at: float) -> None:
        prompt, start, num_tokens = chunk
        prompt.end_tile(num_tokens, ended_at)
        ms = round(1000 * (ended_at - began_at), 2)
        self._instruments.ledger.record(
            "prefill.tile", request_id=prompt.request_id, start=start, num_tokens=num_tokens, ms=ms
        )
        if not chunk.ends_prompt:
            self._report_progress(prompt)

    def _report_progress(self, prompt: Prompt) -> None:
        prompt.emit(Response(progress=prefill_pb2.Progress(num_computed_tokens=prompt.num_computed_tokens)))

    def _finish(self, prompt: Prompt, result: StepResult, now: float) -> None:
        """Token 0 goes straight back; decode gets the commit, or the news that it is not needed."""
        if prompt.must_stop(now):
            return  # its last rows may not have been sent; the next turn ends it
        if isinstance(result, NonFiniteLogits):
            self._end(prompt, result)
            return
        reason = finish_reason(prompt.request, [result.id], self._engine.context_length)
        first = prefill_pb2.FirstToken(token=token_to_proto(result), num_cached_tokens=prompt.num_cached_tokens)
        if reason is not None:
            first.finish_reason = finish_reason_to_proto(reason)
        self._instruments.failpoints.hit("prefill.before_first_token")
        prompt.emit(Response(first_token=first))
        self._instruments.ledger.record("prefill.first_token", request_id=prompt.request_id)
        self._publish_prompt_blocks(prompt)
        self._instruments.failpoints.hit("prefill.before_commit")
        if prompt.transfer is None:
            self._instruments.failpoints.hit("prefill.before_done")
            prompt.emit(Response(done=prefill_pb2.Done(acked=True, prefill_ms=prompt.prefill_ms)))
        elif reason is None:
            prompt.transfer.commit(result)
        else:
            prompt.transfer.abort("finished at token 0", finished=True)
        self._forget(prompt)

    def _publish_prompt_blocks(self, prompt: Prompt) -> None:
        """What is computed is kept, by content, for as long as nothing newer needs the room."""
        computed = prompt.request.prompt_token_ids[: prompt.num_computed_tokens]
        self._engine.publish_prompt(computed, prompt.block_table, prompt.request.tenant)

    def _end(self, prompt: Prompt, error: IsthmusError) -> None:
        """The error is what the caller sees; the transfer's Done, if one follows, comes too late to matter."""
        prompt.emit(error)
        if prompt.transfer is not None:
            prompt.transfer.abort(error.reason)
        self._instruments.ledger.record("prefill.ended", request_id=prompt.request_id, cause=error.reason)
        self._forget(prompt)

    def _forget(self, prompt: Prompt) -> None:
        if prompt in self._waiting:
            self._waiting.remove(prompt)
        if prompt in self._running:
            self._running.remove(prompt)
        self._engine.pool.release(prompt.give_back_blocks())
        self.num_ended += 1


def _engine_chunk(chunk: PromptChunk) -> PrefillChunk:
    return PrefillChunk(chunk.token_ids, chunk.start, chunk.prompt.block_table, needs_logits=chunk.ends_prompt)
