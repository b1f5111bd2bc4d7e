"""Every torch operation allowed on the token path, with the reason why a row's bits do not depend on its batch.

`test_oplist.py` records what prefill, decode, replay and sampling dispatch and fails on anything else; it
also computes each operation of the last three kinds alone and in batches of 1 to 256 rows and compares bits.
"""

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType


class Why(Enum):
    NO_ARITHMETIC = "moves, selects or makes values; nothing is computed from them"
    EXACT = "IEEE-exact or integer result per element: there is one answer whatever the vector width"
    ORDER_FREE = "comparisons only: a maximum or an order of values, ties to the lower index where an index is used"
    PER_ELEMENT = "rounded, but the same instructions for every element, also in the tail of a vector (tested)"
    PER_ROW = "a sum over one contiguous row of a fixed length, in an order fixed by the length (tested)"
    FIXED_SHAPE = "a product of one fixed shape per role, or a batch of such products independent of its size (tested)"


def _because(why: Why, *names: str) -> dict[str, Why]:
    return {f"aten.{name}": why for name in names}


ALLOWED: Mapping[str, Why] = MappingProxyType(
    _because(Why.NO_ARITHMETIC, "alias", "cat", "constant_pad_nd", "contiguous", "copy_", "detach", "detach_", "expand")
    | _because(
        Why.NO_ARITHMETIC,
        "flatten",
        "full_like",
        "gather",
        "index_copy_",
        "index_select",
        "lift_fresh",
        "masked_fill_",
        "narrow",
    )
    | _because(Why.NO_ARITHMETIC, "new_empty", "new_full", "new_zeros", "permute", "reshape", "resolve_conj")
    | _because(Why.NO_ARITHMETIC, "resolve_neg", "roll", "scatter_", "select", "slice", "split", "split_with_sizes")
    | _because(Why.NO_ARITHMETIC, "to", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as")
    | _because(Why.EXACT, "add", "add_", "clamp_", "div", "div_", "mul", "mul_", "neg", "reciprocal_", "sqrt_", "sub")
    | _because(Why.EXACT, "sub_")
    | _because(Why.ORDER_FREE, "amax", "amin", "maximum", "sort", "topk")
    | _because(Why.PER_ELEMENT, "exp_")
    | _because(Why.PER_ROW, "sum")
    | _because(Why.FIXED_SHAPE, "addmm", "bmm", "mm")
)
