"""Multi-head latent attention: projections, the cached row, and the two ways to attend over the paged cache.

Prefill expands keys and values from the latents; decode folds the key expansion into the query and expands the result.
Rows of a step: N with padding, the first `num_rows` real.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.model.linear import Fp8Linear, Linear
from isthmus.model.rope import PositionTables
from isthmus.model.step import StepRows
from kernels.attention_decode.definition import DecodePairs, paged_mla_decode
from kernels.attention_prefill.definition import HeadShape, PrefillTiles, paged_mla_prefill
from kernels.elementwise.definition import rms_norm
from kernels.latents.definition import rotate, write_latents
from kernels.products.definition import grouped_head_matmul
from kernels.shapes import DECODE_GROUP, TILE


@dataclass(frozen=True, slots=True)
class Attention:
    norm: Tensor  # [D]
    norm_eps: float
    latent_norm_eps: float
    shape: HeadShape
    qkv_a: Linear | Fp8Linear  # D to query part + C + R; the query part is its latent, or the query without q_lora
    q_a_norm: Tensor | None
    q_b: Linear | Fp8Linear | None  # q_lora to H * K
    kv_a_norm: Tensor  # [C]
    kv_b: Tensor  # [C, H * (nope + V)]; the next two are parts of it
    key_up: Tensor  # [H, nope, C]
    value_up: Tensor  # [H, C, V]
    o: Linear | Fp8Linear  # H * V to D


@dataclass(frozen=True, slots=True)
class Queries:
    q_nope_NHK: Tensor
    q_pe_NHR: Tensor  # rotated
    scale_N11: Tensor  # fp32, not yet applied


def project_and_store(
    attention: Attention, x_ND: Tensor, rows: StepRows, tables: PositionTables, cache_SL: Tensor
) -> Queries:
    """Queries of the step's rows, whose positions' tables are given; their latents are in the cache when it returns."""
    shape = attention.shape
    group = rows.group
    x = rms_norm(x_ND, attention.norm, eps=attention.norm_eps)
    qkv = attention.qkv_a.forward(x, group=group)
    latent_start = qkv.shape[1] - shape.latent - shape.rope
    q = qkv.narrow(1, 0, latent_start)
    if attention.q_b is not None and attention.q_a_norm is not None:
        q = rms_norm(q, attention.q_a_norm, eps=attention.latent_norm_eps)
        q = attention.q_b.forward(q, group=group)
    q = q.view(-1, shape.num_heads, shape.nope + shape.rope)
    # The shared key rides along as one more head.
    k_pe = qkv.narrow(1, latent_start + shape.latent, shape.rope).unsqueeze(1)
    pe = torch.cat((q.narrow(2, shape.nope, shape.rope), k_pe), dim=1)
    pe = rotate(pe, tables.cos, tables.signed_sin).to(x.dtype)
    latent = qkv.narrow(1, latent_start, shape.latent)
    latent = rms_norm(latent, attention.kv_a_norm, eps=attention.latent_norm_eps)
    n = rows.num_rows
    write_latents(cache_SL, rows.slots, latent.narrow(0, 0, n), pe.select(1, shape.num_heads).narrow(0, 0, n))
    return Queries(q.narrow(2, 0, shape.nope), pe.narrow(1, 0, shape.num_heads), tables.query_scale)


def attend_prefill(attention: Attention, queries: Queries, cache_SL: Tensor, tiles: PrefillTiles) -> Tensor:
    """[N, D] of the attention block."""
    q = torch.cat((queries.q_nope_NHK, queries.q_pe_NHR), dim=-1).float() * queries.scale_N11
    out = paged_mla_prefill(q, cache_SL, attention.kv_b, tiles, attention.shape)
    return attention.o.forward(out.flatten(1).to(queries.q_pe_NHR.dtype), group=TILE)


def attend_decode(attention: Attention, queries: Queries, cache_SL: Tensor, pairs: tuple[DecodePairs, ...]) -> Tensor:
    """[N, D] of the attention block; `pairs` cover consecutive runs of real rows, padding rows attend to nothing."""
    shape = attention.shape
    group = DECODE_GROUP
    absorbed_HNC = grouped_head_matmul(queries.q_nope_NHK, attention.key_up, group=group)
    q_NLH = torch.cat((absorbed_HNC.permute(1, 2, 0), queries.q_pe_NHR.transpose(1, 2)), dim=1)
    q_NLH = q_NLH.float() * queries.scale_N11
    context_NHC = q_NLH.new_zeros(q_NLH.shape[0], shape.num_heads, shape.latent)
    first = 0
    for part in pairs:
        count = part.rows_with_tile[0]
        q = q_NLH.narrow(0, first, count)
        attended = paged_mla_decode(q, cache_SL, part, latent_rank=shape.latent)
        context_NHC.narrow(0, first, count).copy_(attended)
        first += count
    out_HNV = grouped_head_matmul(context_NHC.to(attention.value_up.dtype), attention.value_up, group=group)
    return attention.o.forward(out_HNV.transpose(0, 1).flatten(1), group=group)
