"""Tile scheduling, pure: which positions of which prompts are computed in the next step."""

from collections.abc import Sequence

from prefill_service.prompt import Prompt, PromptChunk


def plan(prompts: Sequence[Prompt], tile: int, tile_budget: int) -> list[PromptChunk]:
    """At most `tile_budget` tokens, dealt one tile at a time in arrival order, so that a short prompt never waits for
    the whole of a long one. Chunks end on absolute multiples of `tile` or at the prompt's end."""
    planned = {id(prompt): 0 for prompt in prompts}
    budget = tile_budget
    progress = True
    while budget > 0 and progress:
        progress = False
        for prompt in prompts:
            num_tokens = min(_next_tile(prompt, planned[id(prompt)], tile), budget)
            planned[id(prompt)] += num_tokens
            budget -= num_tokens
            progress = progress or num_tokens > 0
    chunks = [PromptChunk(prompt, prompt.num_computed_tokens, planned[id(prompt)]) for prompt in prompts]
    return [chunk for chunk in chunks if chunk.num_tokens > 0]


def _next_tile(prompt: Prompt, num_planned: int, tile: int) -> int:
    """Tokens up to the next multiple of `tile`, or to the prompt's end."""
    position = prompt.num_computed_tokens + num_planned
    return min(tile - position % tile, prompt.num_prompt_tokens - position)
