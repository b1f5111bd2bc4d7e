"""Random small configurations of every served architecture, and how a hub's files may differ from transformers' own.

Values are drawn in rounds: any run of consecutive seeds as long as an option's list, starting at a multiple of its
length, takes each of its values once. So a few seeds cover every option, and more seeds cover combinations.
"""

import os
import random
from dataclasses import dataclass
from typing import Any

# So many configurations of every architecture, and the tests marked `oracle` (`make oracle`). 0: a few, and not those.
SEEDS = int(os.environ.get("ORACLE_SEEDS", "0"))
FEW_SEEDS = 2

ARCHITECTURES = (
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe_lite",
    "youtu",
    "axk1",
    "minicpm3",
    "mistral4",
)
MOE = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "axk1", "mistral4")
LIKE_V3 = ("deepseek_v3", "kimi_k2", "glm4_moe_lite", "youtu", "axk1", "mistral4")
CONTEXT = 512
ORIGINAL = 64  # of scaled rotary embeddings: well inside every sequence the tests compute

# num_attention_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
HEADS = ((3, 24, 8, 20), (3, 18, 12, 31), (4, 16, 16, 24), (6, 10, 6, 7), (1, 20, 8, 13))
ODD_HEADS = (3, 17, 8, 11)
YARN = {"factor": CONTEXT / ORIGINAL, "original_max_position_embeddings": ORIGINAL}
YARNS: tuple[dict[str, Any], ...] = (
    {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1},
    {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": 500.0},
    {"mscale": 0.7, "mscale_all_dim": 1.3},
    {"mscale": 0.7},
    {"mscale_all_dim": 0.8, "factor": 3.0},
    {"attention_factor": 1.25, "mscale_all_dim": 1.0},
    {"truncate": False, "rope_theta": 300.0},
    {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 50000.0},
    {"beta_fast": 3.0, "beta_slow": 2.0, "rope_theta": 50.0, "factor": 40.0},
)


@dataclass(frozen=True)
class SmallConfig:
    """`fields` are transformers' own; the rest says how the served directory differs from what transformers writes."""

    name: str
    architecture: str
    fields: dict[str, Any]
    served_type: str
    old_dialect: bool  # rope_scaling, torch_dtype and the fields of remote code
    fused_experts: bool
    stored_bf16: bool
    has_correction_bias: bool

    @property
    def model_type(self) -> str:
        """As transformers knows it."""
        return "deepseek_v3" if self.architecture == "kimi_k2" else self.architecture


def random_config(architecture: str, seed: int) -> SmallConfig:
    """The same arguments give the same configuration."""
    draw = _Draw(architecture, seed)
    even_only = architecture == "deepseek_v2"  # transformers cannot rotate V2's queries and keys at odd offsets
    heads, nope, rope, v = draw("heads", *(HEADS if even_only else (ODD_HEADS, *HEADS)))
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": draw("hidden_size", 48, 60),
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "kv_lora_rank": draw("kv_lora_rank", 32, 24, 40),
        # A.X-K1 has no plain q_proj.
        "q_lora_rank": draw("q_lora_rank", 40, 27 if architecture == "axk1" else None),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": draw("v_head_dim", v, None) if architecture == "minicpm3" else v,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": draw("rms_norm_eps", 1e-5, 1e-6, 1e-2),
        "attention_bias": draw("attention_bias", False, True),
        "tie_word_embeddings": draw("tie_word_embeddings", architecture in ("youtu", "minicpm3"), True, False),
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": None,
        "rope_parameters": _rope(architecture, draw, rope // 2),
    }
    if architecture in LIKE_V3:
        fields["rope_interleave"] = draw("rope_interleave", True, False)
    if architecture in ("deepseek_v2", "minicpm3"):
        fields["mlp_bias"] = draw("mlp_bias", True, False)
    if architecture in MOE:
        fields |= _experts(architecture, draw)
    if architecture == "minicpm3":
        # Exact in bf16: transformers rounds the factor itself, we do not.
        fields["scale_emb"] = draw("scale_emb", 12, 2.5)
        fields["scale_depth"] = draw("scale_depth", 1.4, None)
        fields["dim_model_base"] = draw("dim_model_base", 32, None)
    return SmallConfig(
        name=f"{architecture}-{seed}",
        architecture=architecture,
        fields=fields,
        served_type=draw("served_type", "kimi_k2", "deepseek_v3") if architecture == "kimi_k2" else architecture,
        old_dialect=draw("old_dialect", True, False),
        fused_experts=architecture in MOE and draw("fused_experts", False, True),
        stored_bf16=draw("stored_bf16", True, False),
        has_correction_bias=architecture != "axk1" or draw("has_correction_bias", False, True),
    )


class _Draw:
    """Option values of one configuration."""

    def __init__(self, architecture: str, seed: int) -> None:
        self._architecture = architecture
        self._seed = seed

    def __call__(self, option: str, *values: Any) -> Any:
        round_, place = divmod(self._seed, len(values))
        return random.Random(f"{self._architecture} {option} {round_}").sample(values, len(values))[place]


def _rope(architecture: str, draw: _Draw, num_frequencies: int) -> dict[str, Any]:
    if architecture == "mistral4":
        llama4 = {"llama_4_scaling_beta": draw("llama_4_scaling_beta", 0.1, 0.9)}
        original = {"original_max_position_embeddings": draw("original_max_position_embeddings", 48, ORIGINAL)}
        return {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, **draw("rope", *YARNS), **original, **llama4}
    kinds = ("longrope",) if architecture == "minicpm3" else ("default", "yarn", "linear", "dynamic")
    kind = draw("kind", "yarn", *kinds)
    if kind == "default":
        return {"rope_type": "default", "rope_theta": draw("rope_theta", 10000.0, 1000000.0)}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, **draw("rope", *YARNS)}
    if kind in ("linear", "dynamic"):
        return {"rope_type": kind, "rope_theta": 10000.0, "factor": 3.0, **draw("mscale", {}, {"mscale_all_dim": 1.0})}
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        # The context ends with the short factors' reach, as in MiniCPM3-4B.
        "original_max_position_embeddings": draw("longrope_original", CONTEXT, 2 * CONTEXT),
        "short_factor": [1.0 + 0.4 * i for i in range(num_frequencies)],
        "long_factor": [2.0 + 0.7 * i for i in range(num_frequencies)],
        **draw("longrope", {}, {"factor": 4.0}, {"attention_factor": 1.2}),
    }


def _experts(architecture: str, draw: _Draw) -> dict[str, Any]:
    groups, chosen = (1, 1) if architecture == "kimi_k2" else draw("n_group", (4, 2), (1, 1), (2, 1))
    fields = {
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": draw("n_shared_experts", 1, 2),
        "num_experts_per_tok": draw("num_experts_per_tok", 2, 3),
        "n_group": groups,
        "topk_group": chosen,
        "norm_topk_prob": draw("norm_topk_prob", True, False),
        "routed_scaling_factor": draw("routed_scaling_factor", 1.0, 6.0 if architecture == "deepseek_v2" else 2.5),
    }
    if architecture == "deepseek_v2":
        fields["topk_method"] = draw("topk_method", "group_limited_greedy", "greedy")
    if architecture in ("glm4_moe_lite", "axk1"):
        fields["mlp_layer_types"] = draw(
            "mlp_layer_types",
            ["dense", "sparse", "sparse"],
            ["sparse", "dense", "sparse"],
            ["sparse", "sparse", "dense"],
            ["sparse", "sparse", "sparse"],
        )
    else:
        fields["first_k_dense_replace"] = draw("first_k_dense_replace", 1, 0, 3, 2)
    return fields
