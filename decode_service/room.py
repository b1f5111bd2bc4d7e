"""The room a request takes on a decode worker: blocks for its prompt, promises for the rest, and what is missing."""

from dataclasses import dataclass

from isthmus.engine.block_pool import prefix_hashes
from isthmus.engine.engine import Engine
from isthmus.errors import InvalidRequest, NoFreeBlocks, StaleOwner
from isthmus.kv_layout import KvLayout
from isthmus.types import Extent, Request


@dataclass(frozen=True, slots=True)
class Room:
    block_table: list[int]
    num_set_aside: int  # blocks promised beyond those in the table
    num_cached_tokens: int  # prompt prefix that was here already
    missing: tuple[Extent, ...]  # what may be written


def check_request(engine: Engine, request: Request) -> None:
    """Raises InvalidRequest or StaleOwner for a request that this worker could never run."""
    prompt, emitted = request.prompt_token_ids, request.emitted_token_ids
    num_positions = len(prompt) + request.sampling.max_tokens
    if not prompt or num_positions > engine.context_length:
        allowed = f"1 to {engine.context_length} positions with max_tokens"
        raise InvalidRequest.of("prompt_token_ids", f"{num_positions} positions", allowed)
    if len(emitted) >= request.sampling.max_tokens or max(emitted, default=0) >= engine.model_config.vocab_size:
        allowed = f"fewer than max_tokens, ids below {engine.model_config.vocab_size}"
        raise InvalidRequest.of("emitted_token_ids", f"{len(emitted)} tokens", allowed)
    if request.numerics_digest and request.numerics_digest != engine.numerics.digest:
        raise StaleOwner("the request belongs to another numerics class")


def take_room(engine: Engine, request: Request, *, moves: bool) -> Room:
    """For prompt and max_tokens; of a stream that moves here every block at once. Raises NoFreeBlocks."""
    prompt, pool, layout = request.prompt_token_ids, engine.pool, engine.layout
    num_positions = len(prompt) + request.sampling.max_tokens - 1  # the last token is not stored
    num_written = num_positions if moves else len(prompt)
    num_all_blocks, num_blocks = layout.num_blocks(num_positions), layout.num_blocks(num_written)
    cached = pool.match(prefix_hashes(prompt, pool.block_size, layout.fingerprint))
    try:
        pool.set_aside(num_all_blocks - len(cached))
    except NoFreeBlocks:
        pool.release(cached)
        raise
    blocks = cached + pool.allocate(num_blocks - len(cached), from_set_aside=True)
    num_cached_tokens = len(cached) * pool.block_size
    missing = tuple(extents(layout, num_cached_tokens, num_written))
    return Room(blocks, num_all_blocks - num_blocks, num_cached_tokens, missing)


def publish_prompt(engine: Engine, request: Request, block_table: list[int]) -> None:
    """Full prompt blocks become reusable by content; blocks with generated tokens never do (other rounding)."""
    pool = engine.pool
    hashes = prefix_hashes(request.prompt_token_ids, pool.block_size, engine.layout.fingerprint)
    for block_id, block_hash in zip(block_table, hashes, strict=False):
        pool.publish(block_id, block_hash)


def extents(layout: KvLayout, first: int, end: int) -> list[Extent]:
    """Positions [first, end) of every plane and layer."""
    places = ((plane, layer) for plane, kind in enumerate(layout.planes) for layer in range(kind.num_layers))
    return [Extent(plane, layer, first, end - first) for plane, layer in places if end > first]
