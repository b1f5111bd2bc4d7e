"""One test for each way in which implementations of these models have gone wrong without noticing.

Where a trap shows in bf16 alone, the model is cut down until what remains must agree with transformers element by
element: a single layer, whose attention adds nothing where the router is looked at.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint
from isthmus.errors import CannotStart
from isthmus.steps import DecodeRow
from tests.oracle.configs import LIKE_V3, SmallConfig, random_config
from tests.oracle.models import Model, Written, edit_config, load_oracle, write_model
from tests.oracle.runs import EngineRun, Run, distance, open_engine, prompt, run_oracle

TOKENS = prompt(140, seed=5)


def small(architecture: str, **fields: Any) -> SmallConfig:
    """The same weights for the same shapes, whatever else `fields` say."""
    plain = {"attention_bias": False, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
    config = random_config(architecture, 0)
    return replace(
        config,
        name=architecture,
        fields={**config.fields, **plain, **fields},
        old_dialect=False,
        fused_experts=False,
        has_correction_bias=True,
    )


def ours(model: Written, dtype: str = "fp32", token_ids: list[int] = TOKENS) -> Run:
    """Positions from 100 on, and all latents."""
    run = EngineRun(open_engine(model, dtype), len(token_ids))
    run.prefill(token_ids[:100])
    return Run(run.replay(token_ids[100:], 100), run.latents(len(token_ids)))


def theirs(model: Written, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    run = run_oracle(load_oracle(model.oracle, dtype, **options), TOKENS)
    return Run(run.logits[100:], run.latents)


def assert_same(mine: Run, oracle: Run) -> None:
    torch.testing.assert_close(mine.logits, oracle.logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(mine.latents, oracle.latents, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("architecture", LIKE_V3)
def test_a_rotary_pairs_lie_as_rope_interleave_says(tmp_path: Path, architecture: str):
    models = [
        write_model(tmp_path / str(is_interleaved), small(architecture, rope_interleave=is_interleaved))
        for is_interleaved in (True, False)
    ]
    oracles = [theirs(model) for model in models]
    assert (oracles[0].logits - oracles[1].logits).abs().max() > 0.1
    for model, oracle in zip(models, oracles, strict=True):
        assert_same(ours(model), oracle)


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"])
def test_b_rotation_rounds_where_transformers_rounds(tmp_path: Path, architecture: str):
    """V2 rotates in fp32 and casts back; the others cast cos and sin first and rotate in bf16."""
    (_, mine), (_, oracle) = first_layer(write_model(tmp_path, small(architecture)))
    assert equal_share(mine, oracle) > 0.99


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"])
def test_c_norms_round_before_the_weight(tmp_path: Path, architecture: str):
    (mine, _), (oracle, _) = first_layer(write_model(tmp_path, small(architecture)))
    assert equal_share(mine, oracle) > 0.99


def first_layer(model: Written) -> list[tuple[Tensor, ...]]:
    """Its latents and rotated keys in bf16, ours and transformers'."""
    runs = (ours(model, "bf16"), theirs(model, torch.bfloat16, experts_implementation="eager"))
    rank = model.config.fields["kv_lora_rank"]
    return [run.latents[0].tensor_split([rank], dim=1) for run in runs]


def equal_share(mine: Tensor, oracle: Tensor) -> float:
    assert mine.dtype == oracle.dtype == torch.bfloat16
    return float((mine == oracle).float().mean())


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "axk1"])
def test_d_experts_are_chosen_in_fp32(tmp_path: Path, architecture: str):
    """Experts in pairs whose logits differ by less than bf16 can hold: rounding would choose the wrong half."""

    def in_pairs(model: Model) -> None:
        _router_alone(model)
        gate = model.model.layers[0].mlp.gate
        gate.weight[1::2] = gate.weight[0::2]
        gate.weight[1::2, 3] *= 1 + 2**-7
        if architecture != "deepseek_v2":
            gate.e_score_correction_bias[1::2] = gate.e_score_correction_bias[0::2]

    mine, oracle = routed_logits(write_model(tmp_path, one_expert(architecture), in_pairs))
    assert differing_rows(mine, oracle) <= 3


def test_d_mistral4_weighs_experts_by_rounded_logits(tmp_path: Path):
    """Its router's product is made in the model's dtype. Rounding keeps order, so it shows in the experts' weights."""

    def far_out(model: Model) -> None:
        _router_alone(model)
        gate = model.model.layers[0].mlp.gate
        gate.weight[1::2] = gate.weight[0::2]
        gate.weight[1::2, 3] *= 1 + 2**-4
        gate.weight.mul_(32)

    config = one_expert("mistral4")
    two = replace(config, fields={**config.fields, "num_experts_per_tok": 2, "norm_topk_prob": True})
    mine, oracle = routed_logits(write_model(tmp_path, two, far_out))
    assert (mine - oracle).abs().amax(-1).quantile(0.9) < 0.06  # 0.02; 0.16 with logits in fp32


def one_expert(architecture: str) -> SmallConfig:
    """Of many: a wrong choice changes everything the layer adds."""
    layers = (
        {"mlp_layer_types": ["sparse"]} if architecture in ("glm4_moe_lite", "axk1") else {"first_k_dense_replace": 0}
    )
    groups = {"n_routed_experts": 32, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    return small(architecture, num_hidden_layers=1, **groups, **layers)


def _router_alone(model: Model) -> None:
    """Attention adds zeros, so that what the router sees is each token's own."""
    model.model.layers[0].self_attn.o_proj.weight.zero_()


def routed_logits(model: Written) -> tuple[Tensor, Tensor]:
    """Of every token by itself, in bf16."""
    engine = open_engine(model, "bf16")
    count = 240
    mine = engine.runner.decode([DecodeRow(token, 0, [token]) for token in range(count)])
    oracle = load_oracle(model.oracle, torch.bfloat16, experts_implementation="eager")
    with torch.inference_mode():
        return mine, oracle(torch.arange(count)[:, None]).logits[:, 0].float()


def differing_rows(mine: Tensor, oracle: Tensor) -> int:
    return int(((mine - oracle).abs().amax(-1) > 0.25).sum())


@pytest.mark.parametrize(
    "architecture", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "axk1", "minicpm3", "mistral4"]
)
def test_e_latent_norms_keep_their_own_epsilon(tmp_path: Path, architecture: str):
    """The norms inside attention are built without rms_norm_eps; at 1e-5 the difference would hide in the tolerance."""
    model = write_model(tmp_path, small(architecture, q_lora_rank=40, rms_norm_eps=0.05))
    assert_same(ours(model), theirs(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_f_the_order_in_which_experts_are_added_is_within_the_tolerance(tmp_path: Path, implementation: str):
    model = write_model(tmp_path, small("deepseek_v3", first_k_dense_replace=0, num_experts_per_tok=3))
    assert_same(ours(model), theirs(model, experts_implementation=implementation))


def test_f_of_equal_experts_the_lower_id_is_chosen(tmp_path: Path):
    """transformers leaves the choice open; there a slightly lower bias makes it."""

    def twins(model: Model) -> None:
        for layer in model.model.layers:
            layer.mlp.gate.weight[1::2] = layer.mlp.gate.weight[0::2]
            layer.mlp.gate.e_score_correction_bias[1::2] = layer.mlp.gate.e_score_correction_bias[0::2]

    def decided(model: Model) -> None:
        twins(model)
        for layer in model.model.layers:
            layer.mlp.gate.e_score_correction_bias[1::2] -= 1e-4

    groups = {"n_routed_experts": 32, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}
    config = small("deepseek_v3", first_k_dense_replace=0, **groups)
    served = write_model(tmp_path / "twins", config, twins)
    assert_same(ours(served), theirs(write_model(tmp_path / "decided", config, decided)))


def test_g_attention_weights_are_made_in_fp32(tmp_path: Path):
    """With large scores over many keys, scores rounded to bf16 stand out against transformers' fused attention."""

    def sharp(model: Model) -> None:
        model.model.layers[0].self_attn.q_proj.weight.mul_(8)

    fields = {"num_hidden_layers": 1, "q_lora_rank": None, "first_k_dense_replace": 1}
    model = write_model(tmp_path, small("deepseek_v3", **fields), sharp)
    exact, rounded = theirs(model), theirs(model, torch.bfloat16, attn_implementation="sdpa")
    allowed = 1.5 * distance(exact.logits, rounded.logits).mean()
    assert distance(exact.logits, theirs(model, torch.bfloat16, attn_implementation="eager").logits).mean() > allowed
    by_token = EngineRun(open_engine(model, "bf16"), len(TOKENS)).prefill(TOKENS, range(101, len(TOKENS)))
    assert distance(exact.logits, by_token).mean() < allowed
    assert distance(exact.logits, ours(model, "bf16").logits).mean() < allowed


def test_h_unknown_routing_is_refused_by_name(tmp_path: Path):
    model = write_model(tmp_path, small("deepseek_v2"))
    edit_config(model.served, topk_method="noaux_tc")
    with pytest.raises(CannotStart, match="topk_method is 'noaux_tc'"):
        Checkpoint.open(model.served)


def test_h_no_groups_is_one_group(tmp_path: Path):
    model = write_model(tmp_path, small("deepseek_v3", n_group=1, topk_group=1, first_k_dense_replace=0))
    edit_config(model.served, n_group=None, topk_group=None)
    assert_same(ours(model), theirs(model))


def test_h_kimi_k2_is_computed_like_v3(tmp_path: Path):
    model = write_model(tmp_path, replace(small("kimi_k2"), served_type="kimi_k2"))
    assert json.loads((model.served / "config.json").read_text())["model_type"] == "kimi_k2"
    assert_same(ours(model), theirs(model))


@pytest.mark.parametrize(
    "architecture", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "minicpm3", "mistral4"]
)
def test_i_queries_without_a_latent(tmp_path: Path, architecture: str):
    """Biases included: a plain q_proj never has one."""
    model = write_model(tmp_path, small(architecture, q_lora_rank=None, attention_bias=True))
    assert_same(ours(model), theirs(model))
