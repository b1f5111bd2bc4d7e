"""Publishing: each layer's latent rows leave for decode while the next layer computes."""

from collections.abc import Sequence as Ordered

from isthmus.kv.layout import KvLayout
from isthmus.process.worker_context import WorkerContext
from prefill_service.sequence import Chunk, Sequence


class Abandoned(Exception):
    """Most rows of the step are of cancelled prompts, or of ones out of time: the pass stops between two layers."""


def publish_layer(chunks: Ordered[Chunk], layout: KvLayout, context: WorkerContext, layer: int) -> None:
    """`on_layer` of one step's pass: hands finished rows to the transfers, and checks for cancellation.

    With less than half of the rows wanted, computing the others again in a step of their own is cheaper. Their bits
    will be the same; a transfer sends no row twice.
    """
    context.failpoints.hit("prefill.layer")
    context.progress.layer_done()
    now = context.clock.now()
    live = [chunk for chunk in chunks if not chunk.sequence.must_stop(now)]
    if 2 * num_rows(live) < num_rows(chunks):
        raise Abandoned
    for sequence, start, num_tokens in live:
        send_rows(sequence, layout, layer, start, num_tokens)
        if layer == num_layers(layout) - 1 and start == sequence.num_cached_tokens:
            context.ledger.record("prefill.first_chunk_stored", request_id=sequence.request.request_id)


def num_rows(chunks: Ordered[Chunk]) -> int:
    return sum(chunk.num_tokens for chunk in chunks)


def num_layers(layout: KvLayout) -> int:
    return max(plane.num_layers for plane in layout.planes)


def send_rows(sequence: Sequence, layout: KvLayout, layer: int, start: int, num_tokens: int) -> None:
    """Offers rows of every plane that has this layer; what decode already holds is skipped by the transfer."""
    if sequence.transfer is None or num_tokens == 0:
        return
    for plane in layout.planes:
        if layer < plane.num_layers:
            sequence.transfer.rows_ready(plane.name, layer, start, num_tokens)


def send_cached_prefix(sequence: Sequence, layout: KvLayout) -> None:
    """A prefix found in this worker's cache is sent as it lies, before anything is computed."""
    for layer in range(num_layers(layout)):
        send_rows(sequence, layout, layer, 0, sequence.num_cached_tokens)
