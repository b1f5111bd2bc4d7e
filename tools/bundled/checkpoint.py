"""Read and write the network as a Hugging Face folder: per-expert tensors, MTP layer stored as one layer more."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .network import SHAPE, Network

LAYER_NAMES = {
    "input_norm": "input_layernorm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "attention.q_a": "self_attn.q_a_proj.weight",
    "attention.q_norm": "self_attn.q_a_layernorm.weight",
    "attention.q_b": "self_attn.q_b_proj.weight",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_norm": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b": "self_attn.kv_b_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
    "experts.gate": "mlp.gate.weight",
    "experts.bias": "mlp.gate.e_score_correction_bias",
}
MTP_NAMES = {
    "enorm": "enorm.weight",
    "hnorm": "hnorm.weight",
    "eh_proj": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}
TOP_NAMES = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Save a network's state as published checkpoints do: bf16, the router's correction bias fp32."""
    tensors = {}
    for name, tensor in to_published(state).items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        tensors[name] = tensor.detach().cpu().to(dtype).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def read_network(folder: Path) -> Network:
    """The network of a Hugging Face folder, in fp32, ready to evaluate."""
    network = Network()
    network.load_state_dict(read_state(folder))
    return network.eval()


def read_state(folder: Path) -> dict[str, Tensor]:
    """The network's state from a Hugging Face folder, in fp32."""
    return from_published(load_file(folder / "model.safetensors"))


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Own names to published names, fused tensors taken apart."""
    published = {theirs: state[ours] for ours, theirs in TOP_NAMES.items()}
    for ours, theirs in _layer_prefixes():
        layer = {name.removeprefix(ours): tensor for name, tensor in state.items() if name.startswith(ours)}
        published |= {f"{theirs}{LAYER_NAMES[name]}": layer[name] for name in layer.keys() & LAYER_NAMES.keys()}
        routed = "experts.gate" in layer
        published |= _split_mlp(f"{theirs}mlp.{'shared_experts.' if routed else ''}", layer["gate_up"], layer["down"])
        for expert in range(SHAPE.experts if routed else 0):
            fused = layer["experts.gate_up"][expert]
            down = layer["experts.down"][expert]
            published |= _split_mlp(f"{theirs}mlp.experts.{expert}.", fused, down)
    mtp = f"model.layers.{SHAPE.layers}."
    return published | {f"{mtp}{theirs}": state[f"mtp.{ours}"] for ours, theirs in MTP_NAMES.items()}


def from_published(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names to own names in fp32; a missing tensor raises KeyError."""
    state = {ours: published[theirs] for ours, theirs in TOP_NAMES.items()}
    for ours, theirs in _layer_prefixes():
        routed = f"{theirs}mlp.gate.weight" in published
        names = [name for name in LAYER_NAMES if routed or not name.startswith("experts.")]
        state |= {f"{ours}{name}": published[f"{theirs}{LAYER_NAMES[name]}"] for name in names}
        mlp = f"{theirs}mlp.{'shared_experts.' if routed else ''}"
        state[f"{ours}gate_up"], state[f"{ours}down"] = _fuse_mlp(published, mlp)
        if routed:
            fused = [_fuse_mlp(published, f"{theirs}mlp.experts.{expert}.") for expert in range(SHAPE.experts)]
            state[f"{ours}experts.gate_up"] = torch.stack([gate_up for gate_up, _ in fused])
            state[f"{ours}experts.down"] = torch.stack([down for _, down in fused])
    state |= {f"mtp.{ours}": published[f"model.layers.{SHAPE.layers}.{theirs}"] for ours, theirs in MTP_NAMES.items()}
    return {name: tensor.float() for name, tensor in state.items()}


def _layer_prefixes() -> list[tuple[str, str]]:
    main = [(f"layers.{index}.", f"model.layers.{index}.") for index in range(SHAPE.layers)]
    return [*main, ("mtp.block.", f"model.layers.{SHAPE.layers}.")]


def _split_mlp(prefix: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    gate, up = gate_up.chunk(2, 0)
    return {f"{prefix}gate_proj.weight": gate, f"{prefix}up_proj.weight": up, f"{prefix}down_proj.weight": down}


def _fuse_mlp(published: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    gate_up = torch.cat((published[f"{prefix}gate_proj.weight"], published[f"{prefix}up_proj.weight"]))
    return gate_up, published[f"{prefix}down_proj.weight"]
