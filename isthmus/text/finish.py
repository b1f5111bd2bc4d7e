"""When a sequence ends: a pure function of the request and its tokens, the same on prefill, decode and router."""

from collections.abc import Sequence

from isthmus.types import FinishReason, Request


def finish_reason(request: Request, token_ids: Sequence[int], context_length: int) -> FinishReason | None:
    """Why the sequence ends after the last of `token_ids` (all emitted so far), or None. Stop strings: the router."""
    sampling = request.sampling
    num_tokens = len(token_ids)
    if num_tokens > sampling.min_tokens:
        last = token_ids[-1]
        if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in request.eos_token_ids):
            return FinishReason.STOP
    return FinishReason.LENGTH if is_full(request, num_tokens, context_length) else None


def is_full(request: Request, num_tokens: int, context_length: int) -> bool:
    """Whether no token follows so many, whatever they are."""
    return num_tokens >= request.sampling.max_tokens or len(request.prompt_token_ids) + num_tokens >= context_length
