"""A Hugging Face config.json as one frozen value. A field that would change the maths and is not known is refused."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from isthmus.checkpoint.families import ANY_FAMILY_FIXED, FAMILIES, Family, Routing
from isthmus.checkpoint.fields import Fields, check_fixed, refused
from isthmus.checkpoint.rope_config import Rope, parse_rope
from isthmus.errors import CannotStart

# Fields whose null says something; any other null is an absent field.
_NULL_SPEAKS: Final = frozenset(
    "q_lora_rank n_shared_experts n_group topk_group scale_depth dim_model_base mlp_layer_types".split()
)
_FP8_FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "quant_method": ("fp8",),
    "weight_block_size": ([128, 128],),
    "fmt": (None, "e4m3"),
    "scale_fmt": (None, "float", "ue8m0"),
    "activation_scheme": (None, "dynamic"),
}


@dataclass(frozen=True, slots=True)
class Experts:
    """Shape and routing of the mixture-of-experts layers."""

    routing: Routing
    num_experts: int
    num_per_token: int
    num_shared: int  # one fused MLP of num_shared * width
    width: int
    num_groups: int
    num_groups_chosen: int
    normalise: bool  # weights of the chosen experts are divided by their sum
    scale: float
    norm_output: bool  # an RMSNorm follows the sum of all experts


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shapes and constants of one model; names as in config.json where it has them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    sparse_layers: tuple[bool, ...]  # per layer: it has experts
    intermediate_size: int  # of dense layers
    num_heads: int
    q_lora_rank: int | None  # None: a plain q_proj
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool  # of q_a_proj, kv_a_proj_with_mqa and o_proj
    mlp_bias: bool  # of dense and shared blocks
    rms_norm_eps: float
    rope: Rope
    rotates_in_fp32: bool
    experts: Experts | None
    context_length: int
    embedding_scale: float
    residual_scale: float  # of what each block adds
    logit_divisor: float  # of the hidden state before the head
    tie_word_embeddings: bool
    fp8: bool  # projections may be stored as FP8 in blocks of 128 x 128, beside their weight_scale_inv
    eos_token_ids: tuple[int, ...]

    @property
    def num_layers(self) -> int:
        return len(self.sparse_layers)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_elements(self) -> int:
        """Elements of one cached row: the normed latent, then the rotated key all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def parse_config(raw: Mapping[str, Any], context_length: int | None = None) -> ModelConfig:
    """Reads a config.json; the rotary embedding may be described as rope_scaling or as rope_parameters.

    `context_length`: the most tokens of a request; None: as many as the model allows. Raises CannotStart with the
    field, its value, and what is served.
    """
    family, fields = _family_and_fields(raw)
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    sparse_layers = _sparse_layers(family, fields)
    _check_heads(raw, fields, num_heads)
    context = _context_length(fields.size("max_position_embeddings"), context_length)
    return ModelConfig(
        model_type=fields.raw["model_type"],
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        sparse_layers=sparse_layers,
        intermediate_size=fields.size("intermediate_size"),
        num_heads=num_heads,
        q_lora_rank=fields.size("q_lora_rank") if fields.raw.get("q_lora_rank") is not None else None,
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_nope_head_dim=fields.size("qk_nope_head_dim"),
        qk_rope_head_dim=fields.size("qk_rope_head_dim"),
        v_head_dim=fields.size("v_head_dim", hidden_size // num_heads),
        attention_bias=fields.flag("attention_bias"),
        mlp_bias=fields.flag("mlp_bias"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=parse_rope(family, fields, context),
        rotates_in_fp32=family.rotates_in_fp32,
        experts=_experts(family, family.routing, fields) if family.routing and any(sparse_layers) else None,
        context_length=context,
        embedding_scale=fields.number("scale_emb", 1.0),
        residual_scale=fields.number("scale_depth", math.sqrt(len(sparse_layers))) / math.sqrt(len(sparse_layers)),
        logit_divisor=hidden_size / fields.size("dim_model_base", hidden_size),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        fp8=_fp8(raw),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
    )


def _family_and_fields(raw: Mapping[str, Any]) -> tuple[Family, Fields]:
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise refused("model_type", model_type, tuple(FAMILIES))
    check_fixed({**ANY_FAMILY_FIXED, **family.fixed}, raw)
    given = {name: value for name, value in raw.items() if value is not None or name in _NULL_SPEAKS}
    return family, Fields({**family.defaults, **given})


def token_ids(value: object) -> tuple[int, ...]:
    """The ids of an eos_token_id, which is an integer, a list of integers, or absent. Raises CannotStart."""
    ids: list[object] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) for token_id in ids):
        raise refused("eos_token_id", value, ("token ids", "lists of them"))
    return tuple(token_id for token_id in ids if isinstance(token_id, int))


def _check_heads(raw: Mapping[str, Any], fields: Fields, num_heads: int) -> None:
    check_fixed({"num_key_value_heads": (num_heads,)}, raw)
    if fields.size("qk_rope_head_dim") % 2:
        raise refused("qk_rope_head_dim", fields.raw["qk_rope_head_dim"], ("even numbers",))
    if num_heads * fields.size("kv_lora_rank") % 4:  # rows off multiples of 16 bytes get other bits on some processors
        raise refused("kv_lora_rank", fields.raw["kv_lora_rank"], ("multiples of 4",))


def _context_length(longest: int, wanted: int | None) -> int:
    if wanted is not None and wanted > longest:
        raise CannotStart("context_length", f"{wanted} exceeds the model's {longest}", "set --context-length lower")
    return wanted or longest


def _fp8(raw: Mapping[str, Any]) -> bool:
    quantization: Mapping[str, Any] | None = raw.get("quantization_config")
    if not quantization:
        return False
    check_fixed(
        _FP8_FIXED, {"quant_method": "none", "weight_block_size": "none", **quantization}, "quantization_config."
    )
    return True


def _sparse_layers(family: Family, fields: Fields) -> tuple[bool, ...]:
    num_layers = fields.size("num_hidden_layers")
    if family.routing is None or not fields.raw.get("n_routed_experts"):
        return (False,) * num_layers
    first = fields.count("first_k_dense_replace")
    every = fields.size("moe_layer_freq", 1)
    sparse = tuple(layer >= first and layer % every == 0 for layer in range(num_layers))
    kinds = fields.raw.get("mlp_layer_types")
    if kinds is None:
        return sparse
    if not isinstance(kinds, list) or len(kinds) != num_layers or not {*kinds} <= {"dense", "sparse"}:
        raise refused("mlp_layer_types", kinds, (f"a list of {num_layers} times 'dense' or 'sparse'",))
    given = tuple(kind == "sparse" for kind in kinds)
    if not family.reads_layer_types and given != sparse:
        raise refused("mlp_layer_types", kinds, ("what first_k_dense_replace says",))
    return given


def _experts(family: Family, routing: Routing, fields: Fields) -> Experts:
    grouped = fields.raw.get("topk_method") != "greedy"
    experts = Experts(
        routing=routing,
        num_experts=fields.size("n_routed_experts"),
        num_per_token=fields.size("num_experts_per_tok"),
        num_shared=fields.count("n_shared_experts"),
        width=fields.size("moe_intermediate_size"),
        num_groups=fields.size("n_group", 1) if grouped else 1,
        num_groups_chosen=fields.size("topk_group", 1) if grouped else 1,
        # DeepSeek-V2's own routing never normalises, whatever the field says.
        normalise=fields.flag("norm_topk_prob") and "norm_topk_prob" in family.defaults,
        scale=fields.number("routed_scaling_factor", 1.0),
        norm_output=family.norm_after_experts,
    )
    per_group, rest = divmod(experts.num_experts, experts.num_groups)
    if rest or (per_group < routing.group_best and experts.num_groups > 1):
        allowed = f"divisors of n_routed_experts ({experts.num_experts}) with {routing.group_best} or more to a group"
        raise refused("n_group", experts.num_groups, (allowed,))
    if experts.num_groups_chosen > experts.num_groups:
        raise refused("topk_group", experts.num_groups_chosen, (f"1 to n_group ({experts.num_groups})",))
    if experts.num_per_token > experts.num_groups_chosen * per_group:
        raise refused("num_experts_per_tok", experts.num_per_token, (f"1 to {experts.num_groups_chosen * per_group}",))
    return experts
