"""Small random checkpoints written by transformers, with weights large enough that logits are far apart."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 32,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def yarn(**fields: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        **fields,
    }


def write_model(folder: Path, family: str, **changes: Any) -> Path:
    """`family` is v2 or v3. The same arguments give the same bytes."""
    config_class = {"v2": DeepseekV2Config, "v3": DeepseekV3Config}[family]
    config = config_class(**{**_SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in [
            *model.parameters(),
            *(b for name, b in model.named_buffers() if name.endswith("correction_bias")),
        ]:
            if tensor.dim() > 1:
                tensor.normal_(0.0, 0.15, generator=generator)
            else:
                tensor.add_(torch.empty_like(tensor).normal_(0.0, 0.1, generator=generator))
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
