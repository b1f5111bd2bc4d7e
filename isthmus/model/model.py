"""The decoder: embedding, layers, head. Both roles run the same layers and differ in how their rows attend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from isthmus.checkpoint.model_config import ModelConfig
from isthmus.kv.planes import LATENT
from isthmus.model.attention import Attention, Queries, attend_decode, attend_prefill, project_and_store
from isthmus.model.mlp import Mlp
from isthmus.model.rope import PositionTables
from isthmus.model.step import DecodeStep, PrefillStep, StepRows
from isthmus.steps import OnStored
from kernels.elementwise.definition import rms_norm
from kernels.products.definition import grouped_matmul
from kernels.shapes import DECODE_GROUP


@dataclass(frozen=True, slots=True)
class Layer:
    attention: Attention
    mlp_norm: Tensor
    mlp_norm_eps: float
    mlp: Mlp


Residual = Callable[[Tensor, Tensor], Tensor]  # the stream and what a block adds to it
Attend = Callable[[Attention, Queries, Tensor], Tensor]  # [N, D] of the block, from its queries and the layer's cache


@dataclass(frozen=True, slots=True)
class Model:
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    embedding: Tensor  # [vocab, D]
    embedding_scale: Tensor  # in the model's dtype, as transformers rounds it
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Tensor  # [D, vocab]
    tables: PositionTables
    residual: Residual

    def prefill(self, step: PrefillStep, caches: Sequence[Tensor], on_stored: OnStored) -> Tensor:
        """Logits [rows asked for, vocab] in fp32. `caches[l]` is [slots + 1, row elements], its last row zeros.

        `on_stored(LATENT, l)` is called once layer l's latents are stored; what it raises ends the step.
        """
        return self._forward(step.rows, partial(attend_prefill, tiles=step.tiles), caches, on_stored)

    def decode(self, step: DecodeStep, caches: Sequence[Tensor], on_stored: OnStored) -> Tensor:
        """Logits as of `prefill`, for the rows of a decode step, which attend by the absorbed path."""
        return self._forward(step.rows, partial(attend_decode, pairs=step.pairs), caches, on_stored)

    def _forward(self, rows: StepRows, attend: Attend, caches: Sequence[Tensor], on_stored: OnStored) -> Tensor:
        tables = self.tables.at(rows.positions)
        x = self.embedding.index_select(0, rows.token_ids) * self.embedding_scale
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            queries = project_and_store(layer.attention, x, rows, tables, cache)
            on_stored(LATENT, index)
            x = self.residual(x, attend(layer.attention, queries, cache))
            normed = rms_norm(x, layer.mlp_norm, eps=layer.mlp_norm_eps)
            x = self.residual(x, layer.mlp.forward(normed, rows.num_rows, group=rows.group))
        return self._logits(x, rows)

    def _logits(self, x_ND: Tensor, rows: StepRows) -> Tensor:
        """Of the rows the step asks for; the head takes DECODE_GROUP rows a product in both roles."""
        if rows.num_logits == 0:
            return x_ND.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        wanted = rms_norm(x_ND.index_select(0, rows.logit_rows), self.norm, eps=self.config.rms_norm_eps)
        wanted = wanted / self.config.logit_divisor
        return grouped_matmul(wanted, self.head, group=DECODE_GROUP)[: rows.num_logits].float()
