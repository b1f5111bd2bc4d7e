"""A model whose next token is a hash of everything before it: any lost, repeated or swapped token changes the rest."""

import struct
from collections.abc import Sequence

import xxhash

from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.kv.planes import LATENT
from isthmus.types import Request

VOCAB_SIZE = 50_021
FAKE_LAYOUT = KvLayout("ab" * 16, (Plane(LATENT, PlaneKind.APPEND_ONLY, 4, 2, "fp32"),), 16)
NO_ROW = 0  # stands for the row before a prompt's first


def next_token(request: Request, token_ids: Sequence[int], vocab_size: int = VOCAB_SIZE) -> int:
    """The token that follows the request's prompt and `token_ids`, all emitted so far; a function of the seed too."""
    known = (*request.prompt_token_ids, *token_ids)
    packed = struct.pack(f"<Q{len(known)}I", request.seed, *known)
    return xxhash.xxh3_64_intdigest(packed) % vocab_size


def row_after(before: int, token_id: int) -> int:
    """What a fake engine caches for a token: a hash of the token and of the row before it."""
    return xxhash.xxh3_64_intdigest(before.to_bytes(8) + token_id.to_bytes(4))
