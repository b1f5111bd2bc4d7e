"""Names of prompt prefixes: which cached block holds which tokens, and which prompts begin alike.

A name is a hash over everything that decides what a cached block holds and who may read it:

    scope  = H(0x00, field(layout fingerprint), field(tenant), field(cache_salt))      32 bytes
    name 0 = H(0x01, scope,  tokens of stride 0)                                       its first 16 bytes
    name i = H(0x01, name i-1, tokens of stride i)                                     its first 16 bytes

H is SHA-256. A field is its length in bytes (4 bytes, little-endian) and its UTF-8 bytes, so that no two different
triples of fields are written alike. A token is 4 bytes, little-endian. The first byte keeps scopes and names apart.

The worker names its blocks (the stride is its block size), and a router names the prefixes of the prompts it places.
Both call these functions, so with the same scope and stride they have the same names for the same prefix.
"""

import hashlib
import struct
from collections.abc import Sequence

_SCOPE = b"\x00"
_STRIDE = b"\x01"
_NAME_BYTES = 16


def prefix_scope(layout_fingerprint: str, *, tenant: str = "", cache_salt: str = "") -> bytes:
    """Within which prefixes may be shared: 32 bytes, for `prefix_hashes`.

    Prompts of different layouts, tenants or salts never share a prefix, whatever their tokens are. `cache_salt` names
    what else the cached rows depend on, a weight adapter for example.
    """
    digest = hashlib.sha256(_SCOPE)
    for field in (layout_fingerprint, tenant, cache_salt):
        encoded = field.encode()
        digest.update(struct.pack("<I", len(encoded)))
        digest.update(encoded)
    return digest.digest()


def prefix_hashes(token_ids: Sequence[int], stride: int, scope: bytes) -> list[bytes]:
    """16 bytes for each full stride of tokens, over all tokens up to its end. A rest shorter than a stride has none."""
    parent = scope
    hashes: list[bytes] = []
    for start in range(0, len(token_ids) - stride + 1, stride):
        tokens = struct.pack(f"<{stride}I", *token_ids[start : start + stride])
        parent = hashlib.sha256(_STRIDE + parent + tokens).digest()[:_NAME_BYTES]
        hashes.append(parent)
    return hashes
