"""Weights from safetensors straight into place: mapped files are copied once, in the layout the file has.

Only rows move: gate and up become one matrix, experts one stack, and rotary rows stand as halves. Several threads copy,
since a copy into fresh memory waits on page faults, not on the processor.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint
from isthmus.checkpoint.model_config import Experts, ModelConfig
from isthmus.checkpoint.tensor_names import check_tensors
from isthmus.model.attention import Attention
from isthmus.model.mlp import DenseMlp, ExpertsMlp
from isthmus.model.model import Layer, Model
from isthmus.model.rope import position_tables
from isthmus.model.weights import Part, Progress, Weights
from kernels.attention_prefill.definition import HeadShape
from kernels.experts.definition import Matrices, RouterRule

# transformers builds q_a_layernorm and kv_a_layernorm with RMSNorm's default, whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6
_MAX_THREADS = 4


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress = lambda *_: None,
    *,
    keeps_fp8: bool | None = None,
) -> Model:
    """Checks names, shapes and dtypes of all tensors first; draft (MTP) layers are recognised and left in the file.

    `keeps_fp8` None: block-FP8 matrices stay FP8 on a GPU and are dequantised on a CPU. Raises CannotStart.
    """
    draft_tensors = check_tensors(checkpoint)
    config = checkpoint.config
    keeps_fp8 = device.type == "cuda" if keeps_fp8 is None else keeps_fp8
    with Weights(checkpoint, dtype, device, progress, keeps_fp8, draft_tensors) as weights:
        return assemble(config, weights)


def assemble(config: ModelConfig, weights: Weights) -> Model:
    """The model of these weights, in their dtype on their device."""
    dtype = weights.dtype
    device = weights.device
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        layers = tuple(threads.map(lambda layer: _layer(config, layer, weights), range(config.num_layers)))
    embedding = weights.tensor("model.embed_tokens.weight")
    head = embedding if config.tie_word_embeddings else weights.tensor("lm_head.weight")
    tables = position_tables(config, dtype)
    return Model(
        config=config,
        dtype=dtype,
        device=device,
        embedding=embedding,
        embedding_scale=torch.tensor(config.embedding_scale, dtype=dtype, device=device),
        layers=layers,
        norm=weights.tensor("model.norm.weight"),
        head=head.t(),
        tables=type(tables)(*(table.to(device) for table in tables)),
        residual=torch.add if config.residual_scale == 1.0 else partial(_add_scaled, config.residual_scale),
    )


def _add_scaled(scale: float, x: Tensor, block: Tensor) -> Tensor:
    """Two operations: one that multiplies and adds may round otherwise at the end of a tensor."""
    return x + block * scale


def _layer(config: ModelConfig, layer: int, weights: Weights) -> Layer:
    prefix = f"model.layers.{layer}."
    experts = config.experts if config.sparse_layers[layer] else None
    return Layer(
        attention=_attention(config, weights, prefix),
        mlp_norm=weights.tensor(f"{prefix}post_attention_layernorm.weight"),
        mlp_norm_eps=config.rms_norm_eps,
        mlp=_dense_mlp(weights, f"{prefix}mlp.") if experts is None else _mixture(config, experts, weights, prefix),
    )


def _attention(config: ModelConfig, weights: Weights, layer: str) -> Attention:
    prefix = f"{layer}self_attn."
    H = config.num_heads
    nope = config.qk_nope_head_dim
    rope = config.qk_rope_head_dim
    has_q_lora = config.q_lora_rank is not None
    q_order = _rotary_order(config, num_heads=H, before=nope)
    q_a = Part(f"{prefix}q_a_proj") if has_q_lora else Part(f"{prefix}q_proj", q_order)
    kv_a = Part(f"{prefix}kv_a_proj_with_mqa", _rotary_order(config, num_heads=1, before=config.kv_lora_rank))
    kv_b = weights.plain(Part(f"{prefix}kv_b_proj"))
    kv_heads = kv_b.unflatten(0, (H, nope + config.v_head_dim))
    return Attention(
        norm=weights.tensor(f"{layer}input_layernorm.weight"),
        norm_eps=config.rms_norm_eps,
        latent_norm_eps=_LATENT_NORM_EPS,
        shape=HeadShape(H, nope, rope, config.v_head_dim, config.kv_lora_rank),
        qkv_a=weights.linear(q_a, kv_a),
        q_a_norm=weights.tensor(f"{prefix}q_a_layernorm.weight") if has_q_lora else None,
        q_b=weights.linear(Part(f"{prefix}q_b_proj", q_order)) if has_q_lora else None,
        kv_a_norm=weights.tensor(f"{prefix}kv_a_layernorm.weight"),
        kv_b=kv_b.t(),
        key_up=kv_heads[:, :nope],
        value_up=kv_heads[:, nope:].transpose(1, 2),
        o=weights.linear(Part(f"{prefix}o_proj")),
    )


def _rotary_order(config: ModelConfig, *, num_heads: int, before: int) -> Tensor | None:
    """Where each stored row goes, so that the rotary rows of a head have all first elements of the pairs first.

    One rotation then serves both layouts: the permutation is the same for queries and keys, whose products keep their
    value.
    """
    if not config.rope.interleave:
        return None
    rope = torch.arange(config.qk_rope_head_dim)
    places = torch.cat((torch.arange(before), before + rope // 2 + rope % 2 * (len(rope) // 2)))
    return (torch.arange(num_heads)[:, None] * len(places) + places).flatten()


def _dense_mlp(weights: Weights, prefix: str) -> DenseMlp:
    gate_up = weights.linear(Part(f"{prefix}gate_proj"), Part(f"{prefix}up_proj"))
    return DenseMlp(gate_up, weights.linear(Part(f"{prefix}down_proj")))


def _mixture(config: ModelConfig, experts: Experts, weights: Weights, layer: str) -> ExpertsMlp:
    routing = experts.routing
    prefix = f"{layer}mlp."
    bias = f"{prefix}gate.e_score_correction_bias"
    gate_up, down = _stacks(experts, weights, f"{prefix}experts.")
    return ExpertsMlp(
        router=weights.tensor(f"{prefix}gate.weight", torch.float32 if routing.in_fp32 else None).t(),
        bias=weights.tensor(bias, torch.float32) if bias in weights.entries else None,
        rule=RouterRule(
            softmax=routing.softmax,
            group_best=routing.group_best,
            num_chosen=experts.num_per_token,
            num_groups=experts.num_groups,
            num_groups_chosen=experts.num_groups_chosen,
            normalise=experts.normalise,
            scale=experts.scale,
        ),
        gate_up=gate_up,
        down=down,
        shared=_dense_mlp(weights, f"{prefix}shared_experts.") if experts.num_shared else None,
        norm=weights.tensor(f"{layer}post_mlp_layernorm.weight") if experts.norm_output else None,
        norm_eps=config.rms_norm_eps,
    )


def _stacks(experts: Experts, weights: Weights, prefix: str) -> tuple[Matrices, Matrices]:
    """Gate and up joined, and down; the published files hold a tensor per expert, transformers may write them fused."""
    if f"{prefix}gate_up_proj" in weights.entries:
        return weights.fused_stack(f"{prefix}gate_up_proj"), weights.fused_stack(f"{prefix}down_proj")
    names = [f"{prefix}{expert}." for expert in range(experts.num_experts)]
    gate_up = weights.stack([[Part(f"{name}gate_proj"), Part(f"{name}up_proj")] for name in names])
    return gate_up, weights.stack([[Part(f"{name}down_proj")] for name in names])
