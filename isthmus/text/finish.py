"""When a request has all its tokens: a pure function of request and tokens, the same in every process."""

from collections.abc import Sequence

from isthmus.types import FinishReason, Request


def finish_reason(request: Request, token_ids: Sequence[int], context_length: int) -> FinishReason | None:
    """Why the request ends after the last of `token_ids`, or None when more tokens follow.

    `token_ids`: all emitted so far. Stop strings are looked for by the router, which alone knows the text.
    """
    sampling = request.sampling
    num_tokens = len(token_ids)
    if num_tokens > sampling.min_tokens:
        last = token_ids[-1]
        if last in sampling.stop_token_ids or (not sampling.ignore_eos and last in request.eos_token_ids):
            return FinishReason.STOP
    return FinishReason.LENGTH if is_full(request, num_tokens, context_length) else None


def is_full(request: Request, num_tokens: int, context_length: int) -> bool:
    """Whether `num_tokens` emitted tokens reach the request's or the context's limit."""
    return num_tokens >= request.sampling.max_tokens or len(request.prompt_token_ids) + num_tokens >= context_length
