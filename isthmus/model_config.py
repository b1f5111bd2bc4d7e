"""A Hugging Face config.json as one frozen value. What would change the maths and is not known here is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from isthmus.errors import CannotStart


class Router(Enum):
    """How a token's experts are chosen."""

    # DeepSeek-V2: scores by softmax over all experts; a group scores as its best expert.
    SOFTMAX = "softmax"
    # DeepSeek-V3: scores by sigmoid, chosen by score + bias; a group scores as its best two together.
    SIGMOID_BIAS = "sigmoid_bias"

    @property
    def has_bias(self) -> bool:
        return self is Router.SIGMOID_BIAS


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one model_type from another; `fixed` are fields with a single served value."""

    router: Router
    fixed: Mapping[str, tuple[object, ...]]
    defaults: Mapping[str, Any]


_ANY_FAMILY_FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    # Fields of related architectures: a checkpoint that carries one computes something else.
    "index_topk": (None,),
    "sliding_window": (None,),
    "swiglu_limit": (None,),
    "zero_expert_num": (None, 0),
    "final_logit_softcapping": (None,),
}

_V2 = Family(
    router=Router.SOFTMAX,
    fixed={
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", "group_limited_greedy"),
        # DeepSeek's own code and transformers disagree on what True means for V2.
        "norm_topk_prob": (False,),
        "rope_interleave": (True,),
    },
    defaults={
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
    },
)
_V3 = Family(
    router=Router.SIGMOID_BIAS,
    fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "norm_topk_prob": (True, False)},
    defaults={
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
    },
)
FAMILIES: Final[Mapping[str, Family]] = {"deepseek_v2": _V2, "deepseek_v3": _V3, "kimi_k2": _V3}


@dataclass(frozen=True, slots=True)
class Yarn:
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None
    truncate: bool


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    interleave: bool  # the checkpoint stores rotary pairs side by side; False: the halves follow one another
    yarn: Yarn | None


@dataclass(frozen=True, slots=True)
class Experts:
    """Shape and routing of the mixture-of-experts layers."""

    router: Router
    num_experts: int
    num_per_token: int
    num_shared: int  # one fused MLP of num_shared * width
    width: int
    num_groups: int
    num_groups_chosen: int
    normalise: bool  # weights of the chosen experts are divided by their sum
    scale: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_dense_layers: int  # the first ones; the others have experts
    intermediate_size: int  # of dense layers
    num_heads: int
    q_lora_rank: int | None  # None: a plain q_proj
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    rope: Rope
    experts: Experts | None
    context_length: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_elements(self) -> int:
        """Elements of one cached row: the normed latent, then the rotated key all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads either dialect (rope_scaling, rope_parameters); CannotStart names field, value and what is served."""
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise _refused("model_type", model_type, tuple(FAMILIES))
    _check_fixed(family, raw)
    fields = _Fields({**family.defaults, **{name: value for name, value in raw.items() if value is not None}})
    num_layers = fields.size("num_hidden_layers")
    experts = _experts(family, fields)
    config = ModelConfig(
        model_type=str(model_type),
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        num_layers=num_layers,
        num_dense_layers=num_layers if experts is None else min(fields.count("first_k_dense_replace"), num_layers),
        intermediate_size=fields.size("intermediate_size"),
        num_heads=fields.size("num_attention_heads"),
        q_lora_rank=fields.size("q_lora_rank") if raw.get("q_lora_rank") is not None else None,
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_nope_head_dim=fields.size("qk_nope_head_dim"),
        qk_rope_head_dim=fields.size("qk_rope_head_dim"),
        v_head_dim=fields.size("v_head_dim"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(raw, fields),
        experts=experts,
        context_length=fields.size("max_position_embeddings"),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        eos_token_ids=token_ids(raw.get("eos_token_id")),
    )
    _check_consistent(config, raw)
    return config


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """eos_token_id is an int, a list or absent."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _refused(field: str, value: object, served: tuple[object, ...]) -> CannotStart:
    problem = f"config.json: {field} is {value!r}; served are {', '.join(map(repr, served))}"
    return CannotStart("model", problem, "use a checkpoint of a served kind")


def _check_fixed(family: Family, raw: Mapping[str, Any]) -> None:
    for field, served in {**_ANY_FAMILY_FIXED, **family.fixed}.items():
        if raw.get(field) is not None and raw[field] not in served:
            raise _refused(field, raw[field], served)


def _check_consistent(config: ModelConfig, raw: Mapping[str, Any]) -> None:
    num_kv_heads = raw.get("num_key_value_heads")
    if num_kv_heads is not None and num_kv_heads != config.num_heads:
        raise _refused("num_key_value_heads", num_kv_heads, (config.num_heads,))
    if config.qk_rope_head_dim % 2:
        raise _refused("qk_rope_head_dim", config.qk_rope_head_dim, ("even numbers",))
    kinds = raw.get("mlp_layer_types")
    expected = ["dense"] * config.num_dense_layers + ["sparse"] * (config.num_layers - config.num_dense_layers)
    if kinds is not None and kinds != expected:
        raise _refused("mlp_layer_types", kinds, (expected,))


def _experts(family: Family, fields: "_Fields") -> Experts | None:
    if not fields.raw.get("n_routed_experts"):
        return None
    grouped = fields.raw.get("topk_method") != "greedy"
    experts = Experts(
        router=family.router,
        num_experts=fields.size("n_routed_experts"),
        num_per_token=fields.size("num_experts_per_tok"),
        num_shared=fields.count("n_shared_experts"),
        width=fields.size("moe_intermediate_size"),
        num_groups=fields.size("n_group") if grouped else 1,
        num_groups_chosen=fields.size("topk_group") if grouped else 1,
        normalise=bool(fields.raw["norm_topk_prob"]),
        scale=fields.number("routed_scaling_factor", 1.0),
    )
    per_group, rest = divmod(experts.num_experts, experts.num_groups)
    if rest or (experts.router is Router.SIGMOID_BIAS and per_group < 2):
        allowed = f"divisors of n_routed_experts ({experts.num_experts}), in V3 with two experts a group or more"
        raise _refused("n_group", experts.num_groups, (allowed,))
    if experts.num_groups_chosen > experts.num_groups:
        raise _refused("topk_group", experts.num_groups_chosen, (f"1 to n_group ({experts.num_groups})",))
    if experts.num_per_token > experts.num_groups_chosen * per_group:
        raise _refused("num_experts_per_tok", experts.num_per_token, (f"1 to {experts.num_groups_chosen * per_group}",))
    return experts


def _rope(raw: Mapping[str, Any], fields: "_Fields") -> Rope:
    scaling = _Fields({**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}, "rope_scaling.")
    kind = scaling.raw.get("rope_type") or scaling.raw.get("type") or "default"
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    if kind not in ("default", "yarn"):
        raise _refused("rope_scaling.rope_type", kind, ("default", "yarn"))
    if scaling.raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("rope_scaling.partial_rotary_factor", scaling.raw["partial_rotary_factor"], (1.0,))
    return Rope(theta, raw.get("rope_interleave") is not False, _yarn(scaling, fields) if kind == "yarn" else None)


def _yarn(scaling: "_Fields", fields: "_Fields") -> Yarn:
    """Defaults as in transformers' `_compute_yarn_parameters`; zero counts as absent there too."""
    original = int(scaling.number("original_max_position_embeddings", fields.size("max_position_embeddings")))
    return Yarn(
        factor=scaling.number("factor", fields.size("max_position_embeddings") / original),
        original_max_position_embeddings=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        mscale=scaling.number("mscale", 0.0) or None,
        mscale_all_dim=scaling.number("mscale_all_dim", 0.0) or None,
        attention_factor=scaling.number("attention_factor", 0.0) or None,
        truncate=bool(scaling.raw.get("truncate", True)),
    )


class _Fields:
    """Typed reads of a config dictionary; a wrong value is CannotStart with the field's name."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self.raw = raw
        self._prefix = prefix

    def size(self, name: str) -> int:
        value = self.raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _refused(self._prefix + name, value, ("positive integers",))
        return value

    def count(self, name: str) -> int:
        return 0 if self.raw.get(name) in (None, 0) else self.size(name)

    def number(self, name: str, default: float) -> float:
        value = self.raw.get(name)
        if value is None:
            return float(default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _refused(self._prefix + name, value, ("numbers",))
        return float(value)
