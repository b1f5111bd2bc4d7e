"""Publishing: the rows of each plane and layer leave for decode while the next layer computes."""

from collections.abc import Sequence

from isthmus.kv.layout import KvLayout
from isthmus.v1 import prefill_pb2
from kv_transfer.outgoing import TransferOutcome
from prefill_service.ports import LoopPorts
from prefill_service.prompt import Prompt, PromptChunk


class Abandoned(Exception):
    """Most rows of the step are of cancelled prompts, or of ones out of time: the pass stops between two layers."""


def publish_rows(chunks: Sequence[PromptChunk], ports: LoopPorts, plane: str, layer: int) -> None:
    """`on_stored` of one step: hands the rows of this plane and layer to the transfers. Raises Abandoned.

    With less than half of the rows wanted, computing the others again in a step of their own is cheaper. Their bits
    will be the same; a transfer sends no row twice.
    """
    ports.instruments.failpoints.hit("prefill.layer")
    ports.instruments.progress.layer_done()
    now = ports.now()
    live = [chunk for chunk in chunks if not chunk.prompt.must_stop(now)]
    if 2 * _num_rows(live) < _num_rows(chunks):
        raise Abandoned
    main_plane = ports.engine.layout.planes[0]
    is_last = plane == main_plane.name and layer == main_plane.num_layers - 1
    for prompt, start, num_tokens in live:
        _send_rows(prompt, plane, layer, start, num_tokens)
        if is_last and start == prompt.num_cached_tokens:
            ports.instruments.ledger.record("prefill.first_chunk_stored", request_id=prompt.request_id)


def send_cached_prefix(prompt: Prompt, layout: KvLayout) -> None:
    """A prefix found in this worker's cache is sent as it lies, before anything is computed."""
    for plane, layer in layout.places:
        _send_rows(prompt, plane, layer, 0, prompt.num_cached_tokens)


def transfer_done(prompt: Prompt, blocks: Sequence[int], ports: LoopPorts, outcome: TransferOutcome) -> None:
    """`on_done` of a prompt's transfer, in the sender's thread: its sends read the blocks no more."""
    ports.engine.pool.end_drain(blocks)
    ports.instruments.failpoints.hit("prefill.before_done")
    exposed_ms = (outcome.last_ack_ns or 0) / 1e6 - 1000 * prompt.last_tile_at
    done = prefill_pb2.Done(
        acked=outcome.acked,
        failure=outcome.failure,
        prefill_ms=prompt.prefill_ms,
        transfer_exposed_ms=max(0.0, exposed_ms),
        transfer_bytes=outcome.bytes,
        transfer_blocks=outcome.blocks,
        transfer_frames=outcome.frames,
    )
    prompt.emit(prefill_pb2.PrefillResponse(done=done))


def _num_rows(chunks: Sequence[PromptChunk]) -> int:
    return sum(chunk.num_tokens for chunk in chunks)


def _send_rows(prompt: Prompt, plane: str, layer: int, start: int, num_tokens: int) -> None:
    """Offers rows of one plane and layer; what decode already holds is skipped by the transfer."""
    if prompt.transfer is not None and num_tokens > 0:
        prompt.transfer.rows_ready(plane, layer, start, num_tokens)
