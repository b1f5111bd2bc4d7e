"""Weights from safetensors into the layouts the forward wants: transposed, fused, rotary rows as halves."""

from collections.abc import Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.checkpoint import Checkpoint
from isthmus.errors import CannotStart
from isthmus.model.attention import Attention
from isthmus.model.mlp import DenseMlp, ExpertsMlp, Mlp
from isthmus.model.model import Layer, Model
from isthmus.model.rope import attention_scale, rope_table
from isthmus.model.tensor_names import check_tensors
from isthmus.model_config import Experts, ModelConfig
from kernels import ref

# transformers builds q_a_layernorm and kv_a_layernorm with RMSNorm's default, whatever rms_norm_eps says.
_LATENT_NORM_EPS = 1e-6

Read = Callable[[str], Tensor]


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Model:
    """Checks names, shapes and dtypes of all tensors first; draft (MTP) layers are recognised and left in the file."""
    names = check_tensors(checkpoint)
    config = checkpoint.config
    with _Weights(checkpoint, device) as weights:

        def read(name: str) -> Tensor:
            return weights.read(name).to(dtype)

        embedding = read("model.embed_tokens.weight")
        head = embedding if config.tie_word_embeddings else read("lm_head.weight")
        table = rope_table(config)
        return Model(
            config=config,
            digest=checkpoint.digest,
            dtype=dtype,
            device=device,
            embedding=embedding,
            layers=tuple(_layer(config, layer, read, weights.read) for layer in range(config.num_layers)),
            norm=read("model.norm.weight"),
            head=_transposed(head),
            cos=table.cos.to(device),
            signed_sin=table.signed_sin.to(device),
            draft_tensors=names.draft,
        )


class _Weights:
    """Open, memory-mapped weight files; `read` copies a tensor to the device in the file's dtype."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._files: dict[str, safe_open] = {}

    def __enter__(self) -> "_Weights":
        for file in self._checkpoint.weight_files:
            try:
                self._files[file.name] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CannotStart("model", f"{file} cannot be read: {error}", "fetch the file again") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def read(self, name: str) -> Tensor:
        return self._files[self._checkpoint.tensors[name].file.name].get_tensor(name).to(self._device)


def _layer(config: ModelConfig, layer: int, read: Read, read_as_stored: Read) -> Layer:
    prefix = f"model.layers.{layer}."

    def read_layer(name: str) -> Tensor:
        return read(prefix + name)

    experts = config.experts if layer >= config.num_dense_layers else None
    mlp: Mlp
    if experts is None:
        mlp = _dense_mlp(read_layer, "mlp.")
    else:
        mlp = _experts_mlp(experts, read_layer, lambda name: read_as_stored(prefix + name))
    return Layer(
        attention=_attention(config, read_layer),
        mlp_norm=read_layer("post_attention_layernorm.weight"),
        mlp_norm_eps=config.rms_norm_eps,
        mlp=mlp,
    )


def _attention(config: ModelConfig, read: Read) -> Attention:
    H, nope, rope = config.num_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    interleave = config.rope.interleave
    q_name = "self_attn.q_proj.weight" if config.q_lora_rank is None else "self_attn.q_b_proj.weight"
    q_heads = read(q_name).unflatten(0, (H, nope + rope))
    q = torch.cat((q_heads[:, :nope], _as_halves(q_heads[:, nope:], interleave=interleave)), dim=1).flatten(0, 1)
    kv_a = read("self_attn.kv_a_proj_with_mqa.weight")
    latent, k_pe = kv_a.split((config.kv_lora_rank, rope))
    q_a = q if config.q_lora_rank is None else read("self_attn.q_a_proj.weight")
    kv_b = read("self_attn.kv_b_proj.weight")
    kv_heads = kv_b.unflatten(0, (H, nope + config.v_head_dim))
    return Attention(
        norm=read("input_layernorm.weight"),
        norm_eps=config.rms_norm_eps,
        latent_norm_eps=_LATENT_NORM_EPS,
        scale=attention_scale(config),
        shape=ref.HeadShape(H, nope, rope, config.v_head_dim, config.kv_lora_rank),
        qkv_a=_transposed(torch.cat((q_a, latent, _as_halves(k_pe, interleave=interleave)))),
        q_a_norm=None if config.q_lora_rank is None else read("self_attn.q_a_layernorm.weight"),
        q_b=None if config.q_lora_rank is None else _transposed(q),
        kv_a_norm=read("self_attn.kv_a_layernorm.weight"),
        kv_b=_transposed(kv_b),
        key_up=kv_heads[:, :nope].contiguous(),
        value_up=kv_heads[:, nope:].transpose(1, 2).contiguous(),
        o=_transposed(read("self_attn.o_proj.weight")),
    )


def _as_halves(rows: Tensor, *, interleave: bool) -> Tensor:
    """Rotary output rows with all first elements of the pairs before all second ones: one rotation serves both layouts.

    The permutation is the same for queries and keys, so their products keep their value.
    """
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), dim=-2) if interleave else rows


def _dense_mlp(read: Read, prefix: str) -> DenseMlp:
    gate_up = torch.cat((read(f"{prefix}gate_proj.weight"), read(f"{prefix}up_proj.weight")))
    return DenseMlp(_transposed(gate_up), _transposed(read(f"{prefix}down_proj.weight")))


def _experts_mlp(experts: Experts, read: Read, read_as_stored: Read) -> ExpertsMlp:
    each = [_dense_mlp(read, f"mlp.experts.{expert}.") for expert in range(experts.num_experts)]
    has_bias = experts.router.has_bias
    return ExpertsMlp(
        router=_transposed(read("mlp.gate.weight").float()),
        bias=read_as_stored("mlp.gate.e_score_correction_bias").float() if has_bias else None,
        kind=experts.router,
        rule=ref.RouterRule(
            num_chosen=experts.num_per_token,
            num_groups=experts.num_groups,
            num_groups_chosen=experts.num_groups_chosen,
            normalise=experts.normalise,
            scale=experts.scale,
        ),
        gate_up=tuple(mlp.gate_up for mlp in each),
        down=tuple(mlp.down for mlp in each),
        shared=_dense_mlp(read, "mlp.shared_experts.") if experts.num_shared else None,
    )


def _transposed(weight: Tensor) -> Tensor:
    """[out, in] as stored to [in, out]: the layout that is fastest for few rows."""
    return weight.t().contiguous()
