"""What is asked for, and the config.json that follows from it."""

from dataclasses import dataclass
from typing import Any, Final, Literal

from .published import PUBLISHED, Raw

Scale = Literal["tiny", "small", "full"]
SCALES: Final[tuple[Scale, ...]] = ("tiny", "small", "full")
FP8_BLOCK: Final = 128


@dataclass(frozen=True)
class Recipe:
    """The same recipe gives the same bytes, on any number of cores."""

    like: str
    scale: Scale = "tiny"
    num_layers: int | None = None  # None: as the scale has it
    dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: Literal["float", "ue8m0"] | None = None  # of projections, with scales of any value or powers of two
    shard_bytes: int = 4 << 30
    seed: int = 0


# What differs from the published configuration; a group of experts keeps four members, a plain q_proj stays plain.
_TINY: Final[Raw] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 208,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 16,
    "max_num_groups": 4,
    "context_length": 1024,
    "original_context": 32,
}
_SMALL: Final[Raw] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "q_lora_rank": 512,
    "first_k_dense_replace": 1,
    "n_routed_experts": 24,
    "max_num_groups": 8,
    "context_length": 8192,
    "original_context": 256,
}


def raw_config(recipe: Recipe) -> dict[str, Any]:
    """Of a published model, or of a small one with the same branches."""
    raw = dict(PUBLISHED[recipe.like])
    if recipe.scale != "full":
        _shrink(raw, dict(_TINY if recipe.scale == "tiny" else _SMALL))
    if recipe.num_layers is not None:
        raw["num_hidden_layers"] = recipe.num_layers
    raw["torch_dtype"] = {"bf16": "bfloat16", "fp32": "float32"}[recipe.dtype]
    if recipe.fp8 is not None:
        scale_format = {"scale_fmt": "ue8m0"} if recipe.fp8 == "ue8m0" else {}
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
            "activation_scheme": "dynamic",
            **scale_format,
        }
    return raw


def _shrink(raw: dict[str, Any], sizes: dict[str, Any]) -> None:
    _shrink_routing(raw, sizes.pop("max_num_groups"), sizes["n_routed_experts"])
    _shrink_context(raw, sizes.pop("context_length"), sizes.pop("original_context"), sizes.get("qk_rope_head_dim"))
    if "qk_nope_head_dim" in sizes:
        raw["v_head_dim"] = raw["v_head_dim"] * sizes["qk_nope_head_dim"] // raw["qk_nope_head_dim"]
    raw.update({name: size for name, size in sizes.items() if raw.get(name)})  # absent and null say something, 0 too
    raw["num_key_value_heads"] = raw["num_attention_heads"]
    if "n_routed_experts" not in raw and raw["hidden_size"] > 512:
        raw["num_hidden_layers"] = 8
    raw |= {"bos_token_id": 0, "eos_token_id": 1}
    if "pad_token_id" in raw:
        raw["pad_token_id"] = 2


def _shrink_routing(raw: dict[str, Any], max_num_groups: int, num_experts: int) -> None:
    if raw.get("n_group", 1) > max_num_groups:
        raw |= {"n_group": max_num_groups, "topk_group": max_num_groups // 2}
    if "n_routed_experts" in raw:
        raw["num_experts_per_tok"] = min(raw["num_experts_per_tok"], num_experts // 4)


def _shrink_context(raw: dict[str, Any], context: int, original: int, rope_elements: int | None) -> None:
    """Yarn keeps its factor, from which the scale of attention follows; longrope one context length, as published."""
    raw["max_position_embeddings"] = context
    dialect = next((name for name in ("rope_scaling", "rope_parameters") if raw.get(name)), None)
    if dialect is None:
        return
    rope = raw[dialect] = {**raw[dialect], "original_max_position_embeddings": context}
    if "factor" in rope:
        rope["original_max_position_embeddings"] = original
        raw["max_position_embeddings"] = round(original * rope["factor"])
    for name in ("short_factor", "long_factor"):
        if name in rope and rope_elements is not None:
            rope[name] = rope[name][:: 2 * len(rope[name]) // rope_elements]
