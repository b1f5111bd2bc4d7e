"""The blocks a request reserves on a decode worker: its prompt's now, a promise for the rest, and what is missing."""

from typing import NamedTuple

from isthmus.errors import InvalidRequest, NoFreeBlocks, StaleOwner
from isthmus.types import Extent, Request
from isthmus.worker.engine_port import DecodeEngine
from kv_transfer.coverage import extents


class BlockReservation(NamedTuple):
    block_table: list[int]
    num_set_aside: int  # blocks promised beyond those in the table
    num_cached_tokens: int  # prompt prefix that was here already
    missing: tuple[Extent, ...]  # what may be written


def check_request(engine: DecodeEngine, request: Request) -> None:
    """Raises InvalidRequest or StaleOwner for a request that this worker could never run."""
    max_tokens = request.sampling.max_tokens
    num_positions = len(request.prompt_token_ids) + max_tokens
    if not request.prompt_token_ids or num_positions > engine.context_length:
        allowed = f"1 to {engine.context_length} positions with max_tokens"
        raise InvalidRequest.of("prompt_token_ids", f"{num_positions} positions", allowed)
    emitted = request.emitted_token_ids
    if len(emitted) >= max_tokens or max(emitted, default=0) >= engine.vocab_size:
        allowed = f"fewer than max_tokens, ids below {engine.vocab_size}"
        raise InvalidRequest.of("emitted_token_ids", f"{len(emitted)} tokens", allowed)
    if request.numerics_digest and request.numerics_digest != engine.numerics_digest:
        raise StaleOwner("the request belongs to another numerics class")


def reserve_blocks(engine: DecodeEngine, request: Request, *, moves: bool) -> BlockReservation:
    """Blocks for prompt and max_tokens; of a stream that moves here every block at once. Raises NoFreeBlocks.

    Blocks that hold a cached prefix of the prompt are taken as they are. The caller owns what is returned.
    """
    prompt = request.prompt_token_ids
    layout = engine.layout
    pool = engine.pool
    num_positions = len(prompt) + request.sampling.max_tokens - 1  # the last token is not stored
    num_written = num_positions if moves else len(prompt)
    num_all_blocks = layout.num_blocks(num_positions)
    num_blocks = layout.num_blocks(num_written)
    cached = engine.match_prompt(prompt, request.tenant)
    try:
        pool.set_aside(num_all_blocks - len(cached))
    except NoFreeBlocks:
        pool.release(cached)
        raise
    block_table = cached + pool.allocate(num_blocks - len(cached), from_set_aside=True)
    num_cached_tokens = len(cached) * pool.block_size
    missing = extents(layout, num_cached_tokens, num_written)
    return BlockReservation(block_table, num_all_blocks - num_blocks, num_cached_tokens, missing)
