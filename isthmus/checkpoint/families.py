"""The table of differences between MLA architectures: what a model_type fixes, and what it leaves to config.json.

A field that config.json leaves out has the default of transformers' configuration class, since the oracle reads it so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final


class Bias(Enum):
    """Whether a checkpoint holds e_score_correction_bias."""

    NONE = "none"
    OPTIONAL = "optional"  # absent: zeros
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token's experts are chosen; see `kernels.experts.definition.route`."""

    softmax: bool  # scores over all experts; False: a sigmoid each
    group_best: int  # a group's score is the sum of this many of its highest scores
    bias: Bias = Bias.NONE
    in_fp32: bool = True  # False: router logits are rounded to the model's dtype


@dataclass(frozen=True, slots=True)
class Family:
    """What distinguishes one model_type from another."""

    routing: Routing | None  # None: no mixture of experts
    defaults: Mapping[str, Any]  # of fields that config.json leaves out
    # Fields of which only these values are served; an empty tuple leaves a field free that other families fix.
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    interleaves: bool = True  # rotary pairs stand side by side in the checkpoint, unless rope_interleave says otherwise
    rotates_in_fp32: bool = False  # False: angles are rounded to the model's dtype, and the rotation computed in it
    norm_after_experts: bool = False  # an RMSNorm (post_mlp_layernorm) on the output of the mixture
    reads_layer_types: bool = False  # mlp_layer_types decides which layers have experts; False: first_k_dense_replace
    default_rope: Mapping[str, Any] = field(default_factory=dict[str, Any])


# A checkpoint that carries another value computes something else.
ANY_FAMILY_FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "moe_layer_freq": (1,),
    # Fields of related architectures.
    "index_topk": (None,),
    "sliding_window": (None,),
    "swiglu_limit": (None,),
    "zero_expert_num": (None, 0),
    "final_logit_softcapping": (None,),
    "scale_emb": (1,),
    "scale_depth": (None,),
    "dim_model_base": (None,),
}
_DENSE: Final[Mapping[str, tuple[object, ...]]] = {"n_routed_experts": (None, 0)}
_SIGMOID_FIXED: Final[Mapping[str, tuple[object, ...]]] = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
_V3_DEFAULTS: Final[Mapping[str, Any]] = {
    "q_lora_rank": 1536,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

_V2: Final = Family(
    routing=Routing(softmax=True, group_best=1),
    # norm_topk_prob is read and ignored, as transformers does.
    fixed={"scoring_func": ("softmax",), "topk_method": ("greedy", "group_limited_greedy"), "rope_interleave": (True,)},
    defaults={"q_lora_rank": 1536, "first_k_dense_replace": 0, "n_shared_experts": 2, "topk_method": "greedy"},
    rotates_in_fp32=True,
)
_V3: Final = Family(
    routing=Routing(softmax=False, group_best=2, bias=Bias.REQUIRED),
    fixed={**_SIGMOID_FIXED, "mlp_bias": (False,)},
    defaults=_V3_DEFAULTS,
)
_GLM4_MOE_LITE: Final = Family(
    routing=Routing(softmax=False, group_best=2, bias=Bias.REQUIRED),
    fixed={**_SIGMOID_FIXED, "mlp_bias": (False,), "first_k_dense_replace": (1,)},
    defaults={
        "q_lora_rank": 768,
        "first_k_dense_replace": 1,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "rms_norm_eps": 1e-5,
    },
    reads_layer_types=True,
)
_YOUTU: Final = Family(
    routing=None,
    fixed={**_DENSE, "mlp_bias": (False,)},
    defaults={"q_lora_rank": 1536, "tie_word_embeddings": True},
)
_AXK1: Final = Family(
    routing=Routing(softmax=False, group_best=2, bias=Bias.OPTIONAL),
    fixed={**_SIGMOID_FIXED, "mlp_bias": (False,), "moe_layer_freq": tuple(range(1, 1000))},
    defaults={**_V3_DEFAULTS, "first_k_dense_replace": 1},
    norm_after_experts=True,
    reads_layer_types=True,
)
_MINICPM3: Final = Family(
    routing=None,
    fixed={**_DENSE, "rope_interleave": (False,), "scale_emb": (), "scale_depth": (), "dim_model_base": ()},
    defaults={
        "q_lora_rank": 768,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    interleaves=False,
)
_MISTRAL4: Final = Family(
    routing=Routing(softmax=True, group_best=2, in_fp32=False),
    fixed={"scoring_func": ("softmax",), "mlp_bias": (False,)},
    defaults={
        "q_lora_rank": 1024,
        "first_k_dense_replace": 0,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
    default_rope={
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 128.0,
        "original_max_position_embeddings": 8192,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
)

FAMILIES: Final[Mapping[str, Family]] = {
    "deepseek_v2": _V2,
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "glm4_moe_lite": _GLM4_MOE_LITE,
    "youtu": _YOUTU,
    "axk1": _AXK1,
    "minicpm3": _MINICPM3,
    "mistral4": _MISTRAL4,
}
