"""The decoder over the kernels of `kernels/`: what `isthmus.model.model.Model` computes, in bf16 on a GPU.

A decode step allocates nothing that depends on its rows and never waits for the device, so it can be captured as a CUDA
graph. Prefill differs from decode in its attention (expanded) and in the tiles of its products.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.kv.planes import LATENT
from isthmus.model.model import Layer, Model
from isthmus.model.triton_layers import Rows, TritonAttention, triton_mlp
from isthmus.steps import OnStored
from kernels.attention_decode.schedule import DecodeScratch, schedule_decode
from kernels.attention_prefill.plan import PrefillPlan
from kernels.elementwise.rows import add_rms_norm, embed, rms_norm
from kernels.products.bf16 import linear
from kernels.table import UnsupportedKernel

_MULTIPLE = 16  # every size of a product is a multiple of it


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    token_ids_B: Tensor  # int32
    rows: Rows
    block_tables: Tensor  # [B, blocks of a context] int32
    scratch: DecodeScratch


@dataclass(frozen=True, slots=True)
class PrefillInputs:
    token_ids_N: Tensor  # int32
    rows: Rows
    plan: PrefillPlan
    logit_rows: Tensor  # int64: rows whose logits are wanted, in the caller's order


class _TritonLayer:
    def __init__(self, layer: Layer, model: Model) -> None:
        self.attention = TritonAttention(layer.attention, model.tables)
        self.mlp_norm = layer.mlp_norm
        self.mlp_norm_eps = layer.mlp_norm_eps
        self.mlp = triton_mlp(layer.mlp)


class TritonModel:
    """Shares the weights of `model`. Raises UnsupportedKernel for a model whose dtype or sizes no kernel takes."""

    def __init__(self, model: Model) -> None:
        _check_sizes(model)
        self._embedding = model.embedding
        self._embedding_scale = float(model.embedding_scale)
        self._layers = [_TritonLayer(layer, model) for layer in model.layers]
        self._norm = model.norm
        self._norm_eps = model.config.rms_norm_eps
        self._head = model.head.t()
        self._logit_divisor = model.config.logit_divisor
        self._residual_scale = model.config.residual_scale
        self._num_heads = model.config.num_heads
        self._vocab_size = model.config.vocab_size

    def decode(self, inputs: DecodeInputs, caches: Sequence[Tensor]) -> Tensor:
        """Logits [B, vocab] in fp32; `caches[l]` is layer l's, as `kernels.attention_decode` takes it."""
        rows = inputs.rows
        schedule_decode(rows.positions_N, inputs.scratch, self._num_heads)
        x, normed = self._enter(inputs.token_ids_B)
        for index, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            q = layer.attention.project_and_store(normed, rows, cache, "decode")
            attended = layer.attention.decode(q, rows, cache, inputs.block_tables, inputs.scratch)
            x, normed = self._add(x, attended, layer.mlp_norm, layer.mlp_norm_eps)
            x, normed = self._add(x, layer.mlp.forward(normed, rows, "decode"), *self._norm_after(index))
        return self._logits(normed)

    def prefill(self, inputs: PrefillInputs, caches: Sequence[Tensor], on_stored: OnStored) -> Tensor:
        """Logits [rows asked for, vocab] in fp32.

        `on_stored(LATENT, l)` is called once the storing of layer l's latents is launched. What it raises ends
        the step.
        """
        rows = inputs.rows
        x, normed = self._enter(inputs.token_ids_N)
        for index, (layer, cache) in enumerate(zip(self._layers, caches, strict=True)):
            q = layer.attention.project_and_store(normed, rows, cache, "prefill")
            on_stored(LATENT, index)
            attended = layer.attention.prefill(q, rows, cache, inputs.plan)
            x, normed = self._add(x, attended, layer.mlp_norm, layer.mlp_norm_eps)
            block = layer.mlp.forward(normed, rows, "prefill")
            if index == len(self._layers) - 1:
                x = x.index_select(0, inputs.logit_rows)
                block = block.index_select(0, inputs.logit_rows)
            x, normed = self._add(x, block, *self._norm_after(index))
        return self._logits(normed)

    def _enter(self, token_ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream, and what the first layer reads."""
        x = embed(self._embedding, token_ids_N, self._embedding_scale)
        first = self._layers[0].attention
        return x, rms_norm(x, first.norm, first.norm_eps)

    def _add(self, x_ND: Tensor, block_ND: Tensor, norm_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The stream with what a block adds to it, and its norm, which the next block reads."""
        return add_rms_norm(x_ND, block_ND, norm_D, eps, self._residual_scale)

    def _norm_after(self, index: int) -> tuple[Tensor, float]:
        if index == len(self._layers) - 1:
            return self._norm, self._norm_eps
        following = self._layers[index + 1].attention
        return following.norm, following.norm_eps

    def _logits(self, normed_ND: Tensor) -> Tensor:
        """The head's tiles are those of decode in both roles: a few rows, a wide matrix."""
        if normed_ND.shape[0] == 0:
            return normed_ND.new_empty(0, self._vocab_size, dtype=torch.float32)
        if self._logit_divisor != 1.0:
            normed_ND = normed_ND / self._logit_divisor
        return linear(normed_ND, self._head, role="decode", out_dtype=torch.float32)


def _check_sizes(model: Model) -> None:
    if model.dtype != torch.bfloat16:
        raise UnsupportedKernel(f"the kernels compute in bf16, the model is {model.dtype}")
    config = model.config
    widths = {config.intermediate_size} | (set() if config.experts is None else {config.experts.width})
    sizes = {
        "hidden size": {config.hidden_size},
        "width of a feed-forward block": widths,
        "query latent": {config.q_lora_rank or _MULTIPLE},
        "latent": {config.kv_lora_rank},
        "head": {config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim},
        "vocabulary": {config.vocab_size},
    }
    for name, values in sizes.items():
        for value in values:
            if value % _MULTIPLE:
                raise UnsupportedKernel(f"the kernels take sizes that are multiples of {_MULTIPLE}: {name} is {value}")
