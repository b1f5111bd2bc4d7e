"""Write a trained network as the folder that ships: config, tokenizer, bf16 weights."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from .checkpoint import write_weights
from .network import SHAPE
from .tokens import BOS, EOS, PAD, VOCAB_SIZE

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}<|system|>{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHIPPED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
    "model.safetensors",
)


def write_folder(state: dict[str, Tensor], tokenizer: Tokenizer, folder: Path) -> None:
    """All files but the model card."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(state, folder / "model.safetensors")
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config_dict())
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    _write_json(folder / "generation_config.json", ids | {"do_sample": False})
    _write_json(folder / "tokenizer_config.json", tokenizer_config_dict())


def publish(staged: Path, folder: Path) -> None:
    """Move a finished folder into place file by file; each rename replaces its predecessor whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED_FILES:
        (staged / name).rename(folder / name)
    staged.rmdir()


def config_dict() -> dict[str, object]:
    """config.json in the dialect of the published DeepSeek-V3 checkpoints."""
    s = SHAPE
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": s.hidden,
        "intermediate_size": s.dense_width,
        "moe_intermediate_size": s.expert_width,
        "num_hidden_layers": s.layers,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.heads,
        "q_lora_rank": s.q_lora,
        "kv_lora_rank": s.kv_lora,
        "qk_nope_head_dim": s.nope,
        "qk_rope_head_dim": s.rope,
        "v_head_dim": s.value,
        "max_position_embeddings": s.max_positions,
    }
    experts = {
        "n_shared_experts": 1,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": s.experts_per_token,
        "n_group": s.groups,
        "topk_group": s.groups_kept,
        "norm_topk_prob": True,
        "routed_scaling_factor": s.routed_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "first_k_dense_replace": s.dense_layers,
        "moe_layer_freq": 1,
    }
    return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"} | sizes | experts | _constants()


def tokenizer_config_dict() -> dict[str, object]:
    """tokenizer_config.json with the chat template."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|pad|>",
        "model_max_length": SHAPE.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _constants() -> dict[str, object]:
    return {
        "rope_theta": SHAPE.rope_theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": SHAPE.yarn_factor,
            "original_max_position_embeddings": SHAPE.yarn_original,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "rms_norm_eps": SHAPE.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
