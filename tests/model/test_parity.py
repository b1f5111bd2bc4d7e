"""Against transformers in fp32: logits, greedy tokens and the cached latents themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from isthmus.checkpoint import Checkpoint, resolve_model
from isthmus.engine.engine import Engine
from isthmus.engine.runner import DecodeRow, PrefillChunk
from tests.model.small_models import write_model, yarn

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("v3", {"rope_parameters": yarn(mscale=1.0, mscale_all_dim=1.0)}),
    "v3 without q_lora, half-split rotary": ("v3", {"q_lora_rank": None, "rope_interleave": False}),
    "v3 with one group, no renormalising, tied head": (
        "v3",
        {
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.7,
            "tie_word_embeddings": True,
        },
    ),
    "v3 with differing mscales, eps 1e-5": (
        "v3",
        {"rope_parameters": yarn(mscale=0.7, mscale_all_dim=1.3), "rms_norm_eps": 1e-5},
    ),
    "v3 dense": ("v3", {"first_k_dense_replace": 3}),
    "v2 group limited": ("v2", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}),
    "v2 greedy without q_lora": (
        "v2",
        {"topk_method": "greedy", "q_lora_rank": None, "rope_parameters": yarn(mscale=0.707, mscale_all_dim=0.707)},
    ),
    "v2 with mscale only": ("v2", {"rope_parameters": yarn(mscale=0.7), "first_k_dense_replace": 0}),
}


@pytest.fixture(params=["bundled", *MODELS])
def model_path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "bundled":
        return resolve_model("bundled")
    family, changes = MODELS[request.param]
    return write_model(tmp_path / "model", family, **changes)


@torch.inference_mode()
def test_logits_tokens_and_latents_equal_transformers(model_path: Path):
    engine = Engine.open(Checkpoint.open(model_path), num_blocks=64)
    oracle = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    prompt = [(37 * i + 5) % engine.model_config.vocab_size for i in range(90)]
    expected = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    table = engine.pool.allocate(8)

    engine.runner.prefill([PrefillChunk(prompt[:70], 0, table, needs_logits=False)])
    logits = [engine.runner.prefill([PrefillChunk(prompt[70:], 70, table, needs_logits=True)])]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < 12:
        logits.append(engine.runner.decode([DecodeRow(tokens[-1], len(prompt) + len(tokens) - 1, table)]))
        tokens.append(int(logits[-1].argmax()))

    assert tokens == expected.sequences[0, len(prompt) :].tolist()
    torch.testing.assert_close(torch.cat(logits), torch.cat(expected.logits), atol=1e-4, rtol=1e-5)
    _assert_latents(engine, table, expected.past_key_values, len(prompt) + len(tokens) - 1)


def _assert_latents(engine: Engine, table: list[int], cache: Any, count: int) -> None:
    config = engine.model_config
    for layer in range(config.num_layers):
        rows = engine.cache.layers[0][layer][table].flatten(0, 1)[:count]
        oracle_pe = cache.layers[layer].values[0, 0]
        if config.model_type == "deepseek_v2":  # transformers leaves V2's rotary pairs side by side
            oracle_pe = torch.cat((oracle_pe[:, 0::2], oracle_pe[:, 1::2]), dim=-1)
        oracle_rows = torch.cat((cache.layers[layer].keys[0, 0], oracle_pe), dim=-1)
        torch.testing.assert_close(rows, oracle_rows[:count], atol=1e-4, rtol=1e-5)
