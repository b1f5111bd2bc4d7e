"""The oracle can tell right from wrong: its logits are not flat, and every option that is drawn changes them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.configs import ARCHITECTURES, YARN, YARNS, random_config
from tests.oracle.models import Write, Written, edit_config, load_oracle, write_model
from tests.oracle.runs import prompt, run_oracle

TOKENS = prompt(212, seed=9)
SEEN = 1e-2  # a hundred times what is tolerated


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_j_logits_are_far_apart(written: Write, architecture: str, seed: int):
    model = written(architecture, seed)
    run = run_oracle(load_oracle(model.oracle), TOKENS)
    assert run.logits.std() > 0.5
    assert run.margins.median() > 0.05
    assert (run.margins < 1e-2).float().mean() < 0.1
    assert run.logits.argmax(-1).unique().numel() > 30


# Changes of config.json that must show, and the values of other fields that let them.
CHANGES: dict[str, list[dict[str, Any]]] = {
    "deepseek_v2": [
        {"topk_method": "greedy"},
        {"topk_group": 3},
        {"num_experts_per_tok": 2},
        {"routed_scaling_factor": 1.5},
    ],
    "deepseek_v3": [{"norm_topk_prob": False}, {"topk_group": 3}, {"rope_interleave": False}],
    "kimi_k2": [{"num_experts_per_tok": 2}, {"routed_scaling_factor": 1.5}],
    "glm4_moe_lite": [{"norm_topk_prob": False}, {"rms_norm_eps": 1e-2}, {"n_group": 2, "topk_group": 1}],
    "youtu": [{"rope_interleave": False}, {"rms_norm_eps": 1e-2}],
    "axk1": [{"norm_topk_prob": False}, {"topk_group": 3}],
    "minicpm3": [{"scale_emb": 2.5}, {"scale_depth": 1.0}, {"dim_model_base": 24}],
    "mistral4": [{"norm_topk_prob": False}, {"topk_group": 3}, {"rope_interleave": False}],
}
SPEAKING = {
    "q_lora_rank": 40,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "topk_method": "group_limited_greedy",
    "rope_interleave": True,
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 32,
    "routed_scaling_factor": 2.5,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_option_shows_in_the_logits(tmp_path: Path, architecture: str):
    config = random_config(architecture, 1)
    speaking = {name: value for name, value in SPEAKING.items() if name in config.fields}
    model = write_model(tmp_path / "model", replace(config, fields={**config.fields, **speaking}))
    plain = logits(model.oracle, model)
    for changes in CHANGES[architecture]:
        assert (changed(model, tmp_path, **changes) - plain).abs().amax() > SEEN, changes


DEFAULTS = {"beta_fast": 32, "beta_slow": 1}


def test_every_rotary_field_shows_in_the_logits(written: Write, tmp_path: Path):
    model = written("deepseek_v3", 0)
    plain = {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}
    for variant in YARNS:
        whole = changed(model, tmp_path, rope_parameters={**plain, **variant})
        for field in (name for name in variant if variant[name] != DEFAULTS.get(name)):
            others = {name: value for name, value in variant.items() if name != field}
            without = changed(model, tmp_path, rope_parameters={**plain, **others})
            says_nothing = variant == {"mscale": 0.7}  # transformers reads mscale beside mscale_all_dim only
            assert ((whole - without).abs().max() > SEEN) != says_nothing, (field, variant)


def test_query_scaling_shows_in_the_logits(written: Write, tmp_path: Path):
    model = written("mistral4", 0)
    rope = json.loads((model.oracle / "config.json").read_text())["rope_parameters"]
    plain = logits(model.oracle, model)
    other = changed(model, tmp_path, rope_parameters={**rope, "llama_4_scaling_beta": 0.0})
    start = rope["original_max_position_embeddings"]
    assert torch.equal(plain[:start], other[:start])
    assert ((plain - other)[start:].abs().amax(-1) > SEEN).all()


def logits(folder: Path, model: Written) -> Tensor:
    return run_oracle(load_oracle(folder), TOKENS).logits


def changed(model: Written, tmp_path: Path, **changes: Any) -> Tensor:
    folder = tmp_path / "changed"
    shutil.copytree(model.oracle, folder, dirs_exist_ok=True)
    edit_config(folder, **changes)
    return logits(folder, model)
