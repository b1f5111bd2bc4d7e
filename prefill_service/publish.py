"""Publishing: the rows of each plane and layer leave for decode while the next layer computes."""

from collections.abc import Sequence as Ordered

from isthmus.kv.layout import KvLayout
from isthmus.process.worker_context import WorkerContext
from prefill_service.sequence import Chunk, Sequence


class Abandoned(Exception):
    """Most rows of the step are of cancelled prompts, or of ones out of time: the pass stops between two layers."""


def publish_rows(chunks: Ordered[Chunk], layout: KvLayout, context: WorkerContext, plane_name: str, layer: int) -> None:
    """`on_stored` of one step: hands the rows of this plane and layer to the transfers, and checks for cancellation.

    With less than half of the rows wanted, computing the others again in a step of their own is cheaper. Their bits
    will be the same; a transfer sends no row twice.
    """
    context.failpoints.hit("prefill.layer")
    context.progress.layer_done()
    now = context.clock.now()
    live = [chunk for chunk in chunks if not chunk.sequence.must_stop(now)]
    if 2 * num_rows(live) < num_rows(chunks):
        raise Abandoned
    plane = next(index for index, plane in enumerate(layout.planes) if plane.name == plane_name)
    is_last = plane == 0 and layer == layout.planes[plane].num_layers - 1
    for sequence, start, num_tokens in live:
        send_rows(sequence, plane, layer, start, num_tokens)
        if is_last and start == sequence.num_cached_tokens:
            context.ledger.record("prefill.first_chunk_stored", request_id=sequence.request.request_id)


def num_rows(chunks: Ordered[Chunk]) -> int:
    return sum(chunk.num_tokens for chunk in chunks)


def send_rows(sequence: Sequence, plane: int, layer: int, start: int, num_tokens: int) -> None:
    """Offers rows of one plane and layer; what decode already holds is skipped by the transfer."""
    if sequence.transfer is not None and num_tokens > 0:
        sequence.transfer.rows_ready(plane, layer, start, num_tokens)


def send_cached_prefix(sequence: Sequence, layout: KvLayout) -> None:
    """A prefix found in this worker's cache is sent as it lies, before anything is computed."""
    for plane, layer in layout.places:
        send_rows(sequence, plane, layer, 0, sequence.num_cached_tokens)
