"""The rotary embedding as config.json describes it, in either dialect."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from isthmus.checkpoint.families import Family
from isthmus.checkpoint.fields import Fields, refused
from isthmus.errors import CannotStart

_KINDS: Final = ("default", "linear", "dynamic", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding; names as in config.json. None and 0 both mean absent, as in transformers."""

    kind: str  # default, linear, yarn or longrope; dynamic is default within the context it was made for
    theta: float
    interleave: bool  # the checkpoint stores rotary pairs side by side; False: the halves follow one another
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    attention_factor: float
    truncate: bool
    short_factor: tuple[float, ...]  # longrope: a divisor for each frequency
    llama_4_scaling_beta: float  # queries grow by 1 + beta * ln(1 + floor(position / original_max))


def parse_rope(family: Family, fields: Fields, context_length: int) -> Rope:
    """Reads rope_scaling, else rope_parameters. Raises CannotStart for what is not served.

    Defaults are those of transformers' `ROPE_INIT_FUNCTIONS`.
    """
    given = fields.raw.get("rope_scaling") or fields.raw.get("rope_parameters") or family.default_rope
    if not isinstance(given, Mapping):
        raise refused("rope_scaling", given, ("null", "an object"))
    scaling = Fields(given, "rope_scaling.")
    kind = scaling.raw.get("rope_type") or scaling.raw.get("type") or "default"
    if kind not in _KINDS:
        raise refused("rope_scaling.rope_type", kind, _KINDS)
    rotated = scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    elements = fields.size("qk_rope_head_dim")
    # Mistral 4 counts the elements that are not rotated, too.
    whole = elements / (elements + fields.size("qk_nope_head_dim")) if family.default_rope else 1.0
    if rotated not in (1.0, whole):
        raise refused("rope_scaling.partial_rotary_factor", rotated, (whole,))
    longest = fields.size("max_position_embeddings")
    original = fields.size(
        "original_max_position_embeddings", scaling.size("original_max_position_embeddings", longest)
    )
    return Rope(
        kind="default" if kind == "dynamic" else kind,
        theta=scaling.number("rope_theta", fields.number("rope_theta", 10000.0)),
        interleave=fields.flag("rope_interleave", default=family.interleaves),
        factor=scaling.number("factor", longest / original),
        original_max_position_embeddings=original,
        beta_fast=scaling.number("beta_fast", 0.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 0.0) or 1.0,
        mscale=scaling.number("mscale", 0.0),
        mscale_all_dim=0.0 if kind == "default" else scaling.number("mscale_all_dim", 0.0),
        attention_factor=scaling.number("attention_factor", 0.0),
        truncate=scaling.flag("truncate", default=True),
        short_factor=_short_factor(scaling, context_length, original, elements) if kind == "longrope" else (),
        llama_4_scaling_beta=scaling.number("llama_4_scaling_beta", 0.0) if family.default_rope else 0.0,
    )


def _short_factor(scaling: Fields, context: int, original: int, elements: int) -> tuple[float, ...]:
    """The divisor of each frequency. Raises CannotStart for a context beyond the original one.

    There longrope rotates all positions otherwise, also those whose latents are cached: a row of the cache would no
    longer be a function of its position.
    """
    short = scaling.raw.get("short_factor")
    long = scaling.raw.get("long_factor")
    if not isinstance(short, list) or len(short) != elements // 2 or not {*map(type, short)} <= {int, float}:
        raise refused("rope_scaling.short_factor", short, (f"lists of {elements // 2} numbers",))
    if context > original and short != long:
        problem = f"longrope changes its frequencies after {original} positions, the context is {context}"
        raise CannotStart("context_length", problem, f"set --context-length {original} or lower")
    return tuple(map(float, short))
