"""What a cached position looks like: planes, row and block bytes, and the fingerprint two workers must share."""

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import Enum

WIRE_VERSION = 2
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}  # an fp8 row's elements are its bytes, scales included


class PlaneKind(Enum):
    APPEND_ONLY = "append_only"
    WINDOWED = "windowed"
    MUTABLE = "mutable"


@dataclass(frozen=True, slots=True)
class Plane:
    """One kind of cache row on `num_layers` layers; MLA's latent plane has kv_lora_rank + qk_rope_head_dim elements."""

    name: str
    kind: PlaneKind
    num_layers: int
    row_elements: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        return self.row_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Layout of a request's cache; memory of a (plane, layer) is `[num_blocks, block_size, row_bytes]`, contiguous."""

    model_digest: str
    planes: tuple[Plane, ...]
    block_size: int  # tokens
    wire_version: int = WIRE_VERSION

    @property
    def fingerprint(self) -> str:
        """32 hex digits over every field; pools that differ are never paired."""
        canonical = json.dumps(asdict(self), default=lambda kind: kind.value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    @property
    def bytes_per_token(self) -> int:
        return sum(plane.num_layers * plane.row_bytes for plane in self.planes)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    @property
    def places(self) -> list[tuple[int, int]]:
        """Every (plane, layer)."""
        return [(number, layer) for number, plane in enumerate(self.planes) for layer in range(plane.num_layers)]

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def differing_fields(self, other: "KvLayout") -> list[str]:
        """Readable `field: mine != theirs` lines, empty when the layouts are equal."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]
