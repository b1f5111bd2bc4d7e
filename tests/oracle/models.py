"""Random small checkpoints: as transformers writes them, and beside that as a hub may hold the same model."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracle.configs import SmallConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# What remote code of the V3 family writes and transformers drops.
_REMOTE_FIELDS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}


Model = Any  # of transformers


@dataclass(frozen=True)
class Written:
    """`oracle` is for transformers, `served` for us."""

    config: SmallConfig
    oracle: Path
    served: Path


Write = Callable[[str, int], Written]  # of an architecture and a seed


def write_model(folder: Path, config: SmallConfig, change: Callable[[Model], None] | None = None) -> Written:
    """The same arguments give the same bytes. `change` edits the model before it is saved."""
    model = random_model(config)
    if change is not None:
        with torch.no_grad():
            change(model)
    written = Written(config, folder / "oracle", folder / "served")
    model.save_pretrained(written.oracle)
    _write_served(written)
    _write_tokenizer(written.served)
    return written


def random_model(config: SmallConfig) -> Model:
    """With weights large enough that logits are far apart, and all but the correction bias exact in bf16."""
    parsed = transformers.AutoConfig.for_model(config.model_type, **config.fields)
    model = _model_class(parsed)._from_config(parsed, dtype=torch.float32)
    generator = torch.Generator().manual_seed(sum(config.name.encode()))
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0.0, 0.1, generator=generator).mul_(config.has_correction_bias)
            elif isinstance(tensor, torch.nn.Parameter):
                mean, std = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.15)
                tensor.normal_(mean, std, generator=generator).copy_(tensor.bfloat16())
    return model.eval()


def load_oracle(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Model:
    parsed = transformers.AutoConfig.from_pretrained(folder)
    return _model_class(parsed).from_pretrained(folder, dtype=dtype, **options).eval()


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _model_class(parsed: Any) -> Any:
    """By its name: Mistral4 is in no auto class."""
    return getattr(transformers, type(parsed).__name__.removesuffix("Config") + "ForCausalLM")


def _write_served(written: Written) -> None:
    config, folder = written.config, written.served
    folder.mkdir()
    raw = json.loads((written.oracle / "config.json").read_text())
    tensors = load_file(written.oracle / "model.safetensors")
    tensors = _fused(tensors) if config.fused_experts else _per_expert(tensors)
    if not config.has_correction_bias:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("correction_bias")}
    if config.old_dialect:
        raw = _old_dialect(config, raw)
        tensors |= _leftovers(config, tensors)
    if config.stored_bf16:
        tensors = {name: t if name.endswith("correction_bias") else t.bfloat16() for name, t in tensors.items()}
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": config.served_type}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 256, "eos_token_id": [257, 258]}))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def _old_dialect(config: SmallConfig, raw: dict[str, Any]) -> dict[str, Any]:
    derived = ("rope_parameters", "dtype", "head_dim", "qk_head_dim", "transformers_version")
    old = {name: value for name, value in raw.items() if name not in derived}
    rope = {name: value for name, value in raw["rope_parameters"].items() if name != "partial_rotary_factor"}
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    old["torch_dtype"] = "bfloat16" if config.stored_bf16 else "float32"
    if config.architecture in ("deepseek_v3", "kimi_k2", "glm4_moe_lite"):
        old |= _REMOTE_FIELDS
    if config.fields["v_head_dim"] is None:
        del old["v_head_dim"]
    kinds = old.get("mlp_layer_types")
    if kinds == ["dense", "sparse", "sparse"]:  # what both architectures take it for where it is absent
        del old["mlp_layer_types"]
        old["first_k_dense_replace"] = 1
    return old


def _leftovers(config: SmallConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that published checkpoints hold although nothing reads them."""
    left = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(config.fields["qk_rope_head_dim"] // 2)}
    if "lm_head.weight" not in tensors:
        left["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if config.architecture == "axk1":
        norms = (f"model.layers.{layer}.post_mlp_layernorm.weight" for layer in range(3))
        left |= {name: torch.full((config.fields["hidden_size"],), 3.0) for name in norms if name not in tensors}
    return left


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    experts: dict[str, dict[tuple[str, int], Tensor]] = {}
    fused = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(found[1], {})[found[3], int(found[2])] = tensor
        else:
            fused[name] = tensor
    for prefix, parts in experts.items():
        ids = range(len(parts) // 3)
        gate_up = [torch.cat((parts["gate_proj", e], parts["up_proj", e])) for e in ids]
        fused |= {f"{prefix}.gate_up_proj": torch.stack(gate_up)}
        fused |= {f"{prefix}.down_proj": torch.stack([parts["down_proj", e] for e in ids])}
    return fused


def _per_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    apart = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(each.chunk(2) for each in tensor):
                prefix = f"{name.removesuffix('gate_up_proj')}{e}."
                apart |= {f"{prefix}gate_proj.weight": gate.clone(), f"{prefix}up_proj.weight": up.clone()}
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            apart |= {f"{prefix}{e}.down_proj.weight": each.clone() for e, each in enumerate(tensor)}
        else:
            apart[name] = tensor
    return apart


def _write_tokenizer(folder: Path) -> None:
    """One token a byte, then bos and eos; further ids of the model have no text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
