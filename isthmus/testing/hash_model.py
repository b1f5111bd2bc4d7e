"""A model whose next token is a hash of everything before it: any lost, repeated or swapped token changes the rest."""

import struct
from collections.abc import Sequence

import xxhash

from isthmus.types import Request

VOCAB_SIZE = 50_021


def next_token(request: Request, token_ids: Sequence[int], vocab_size: int = VOCAB_SIZE) -> int:
    """The token that follows the request's prompt and `token_ids`, all emitted so far; a function of the seed too."""
    known = (*request.prompt_token_ids, *token_ids)
    packed = struct.pack(f"<Q{len(known)}I", request.seed, *known)
    return xxhash.xxh3_64_intdigest(packed) % vocab_size
