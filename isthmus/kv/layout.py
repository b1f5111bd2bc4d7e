"""What a cached position looks like: planes, row and block bytes, and the fingerprint two workers must share."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from isthmus.types import Extent, Place

WIRE_VERSION = 2
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}  # an fp8 row's elements are its bytes, scales included


class PlaneKind(Enum):
    APPEND_ONLY = "append_only"
    WINDOWED = "windowed"
    MUTABLE = "mutable"


@dataclass(frozen=True, slots=True)
class Plane:
    """One kind of cache row on `num_layers` layers; MLA's latent plane has kv_lora_rank + qk_rope_head_dim elements.

    An `advisory` plane (drafting) can never reach an output. Two workers need not share it: it is outside the layout's
    fingerprint, and no transfer waits for its rows or fails for want of them.
    """

    name: str
    kind: PlaneKind
    num_layers: int
    row_elements: int
    dtype: str
    advisory: bool = False

    @property
    def row_bytes(self) -> int:
        return self.row_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Layout of a request's cache; memory of a place is `[num_blocks, block_size, row_bytes]`, contiguous.

    Planes go by their names, which are unique. On the wire a plane has a number instead: the required planes first, in
    order, then the advisory ones. So peers that share a fingerprint agree on the numbers of all required planes; those
    with several advisory planes agree on them as far as their lists begin alike.
    """

    model_digest: str
    planes: tuple[Plane, ...]
    block_size: int  # tokens
    wire_version: int = WIRE_VERSION

    def __post_init__(self) -> None:
        if len({plane.name for plane in self.planes}) != len(self.planes):
            raise ValueError("two planes of one name")

    @property
    def fingerprint(self) -> str:
        """32 hex digits over every field and required plane; pools that differ are never paired."""
        fields = self._required_fields()
        canonical = json.dumps(fields, default=lambda kind: kind.value, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    @property
    def bytes_per_token(self) -> int:
        return sum(plane.num_layers * plane.row_bytes for plane in self.planes)

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    def plane(self, name: str) -> Plane:
        """Raises KeyError for a plane that this layout does not have, as `number_of` does."""
        for plane in self.planes:
            if plane.name == name:
                return plane
        raise KeyError(name)

    def number_of(self, name: str) -> int:
        """What the plane is called on the wire."""
        for number, plane in enumerate(self._in_wire_order()):
            if plane.name == name:
                return number
        raise KeyError(name)

    def name_of(self, number: int) -> str:
        """The plane that has this number on the wire. Raises KeyError for none."""
        planes = self._in_wire_order()
        if not 0 <= number < len(planes):
            raise KeyError(number)
        return planes[number].name

    @property
    def places(self) -> list[Place]:
        """Every place, by the plane's number on the wire and the layer."""
        return [(plane.name, layer) for plane in self._in_wire_order() for layer in range(plane.num_layers)]

    @property
    def required_places(self) -> list[Place]:
        """Places without whose rows nothing can be decoded."""
        return [place for place in self.places if not self.plane(place[0]).advisory]

    def required(self, extents: Iterable[Extent]) -> tuple[Extent, ...]:
        """Those of `extents` that do not lie in advisory planes."""
        return tuple(extent for extent in extents if not self.plane(extent.plane).advisory)

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def differing_fields(self, other: "KvLayout") -> list[str]:
        """Readable `field: mine != theirs` lines; empty when the fingerprints are equal."""
        mine = self._required_fields()
        theirs = other._required_fields()  # noqa: SLF001 - of its own class
        return [f"{name}: {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]

    def _required_fields(self) -> dict[str, Any]:
        """Every field by its name, without what advisory planes add."""
        fields = asdict(self)
        required = [plane for plane in fields["planes"] if not plane["advisory"]]
        for plane in required:
            del plane["advisory"]
        return {**fields, "planes": required}

    def _in_wire_order(self) -> list[Plane]:
        return sorted(self.planes, key=lambda plane: plane.advisory)
