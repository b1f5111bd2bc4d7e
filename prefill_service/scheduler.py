"""Tile scheduling, pure: which positions of which prompts are computed in the next step."""

from collections.abc import Sequence as Ordered

from prefill_service.sequence import Chunk, Sequence


def plan(sequences: Ordered[Sequence], tile: int, tile_budget: int) -> list[Chunk]:
    """At most `tile_budget` tokens, dealt one tile at a time in arrival order, so that a short prompt never waits for
    the whole of a long one. Chunks end on absolute multiples of `tile` or at the prompt's end."""
    planned = {id(sequence): 0 for sequence in sequences}
    budget = tile_budget
    progress = True
    while budget > 0 and progress:
        progress = False
        for sequence in sequences:
            num_tokens = min(_next_tile(sequence, planned[id(sequence)], tile), budget)
            planned[id(sequence)] += num_tokens
            budget -= num_tokens
            progress = progress or num_tokens > 0
    chunks = [Chunk(sequence, sequence.num_computed_tokens, planned[id(sequence)]) for sequence in sequences]
    return [chunk for chunk in chunks if chunk.num_tokens > 0]


def _next_tile(sequence: Sequence, num_planned: int, tile: int) -> int:
    position = sequence.num_computed_tokens + num_planned
    return min(tile - position % tile, sequence.num_prompt_tokens - position)
