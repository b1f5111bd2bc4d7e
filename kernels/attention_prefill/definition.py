"""Expanded attention in plain torch: keys and values of a prefill step are made from the latents as they are stored.

Shapes: N rows of a step; Q query tiles; H heads; K query/key elements of a head; C latent rank; R rotary elements;
L = C + R; V value elements of a head; S cache slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.products.definition import grouped_matmul
from kernels.shapes import TILE


class KeyTile(NamedTuple):
    """One tile index of a prefill step, for the sequences that reach it."""

    slots: Tensor  # [sequences * TILE], as in DecodePairs
    sequence: Tensor | None  # [Q] which of the sequences a query tile reads; None: one query tile each, in order
    hidden: Tensor | None  # [Q, 1, TILE, TILE] bool: the key is past the query; None: no query tile ends here
    num_query_tiles: int  # query tiles that see this tile are a prefix


class PrefillTiles(NamedTuple):
    """Queries arranged in tiles at absolute positions, those with most key tiles first."""

    rows: (
        Tensor  # [query tiles * TILE] row of the step; positions outside the chunk name row 0, their result is not read
    )
    slot_of_row: Tensor  # [N] where a row's result lies among them
    keys: tuple[KeyTile, ...]  # tile 0 first


class HeadShape(NamedTuple):
    num_heads: int
    nope: int
    rope: int
    value: int
    latent: int


def paged_mla_prefill(q_NHK: Tensor, cache_SL: Tensor, kv_b: Tensor, tiles: PrefillTiles, shape: HeadShape) -> Tensor:
    """Expanded attention: keys and values of every tile are made from the latents as stored. Returns [N, H, V] in fp32.

    `kv_b` is [C, H * (nope + V)]; queries come scaled. Query tiles meet key tiles, both of TILE rows, folded in order.
    """
    H = shape.num_heads
    K = shape.nope + shape.rope
    V = shape.value
    q = q_NHK.index_select(0, tiles.rows).unflatten(0, (-1, TILE)).transpose(1, 2).reshape(-1, TILE, K)
    peak = q.new_full(q.shape[:2], -torch.inf)
    total = q.new_zeros(q.shape[:2])
    acc = q.new_zeros(*q.shape[:2], V)
    for tile in tiles.keys:
        k, v = _expand_tile(cache_SL.index_select(0, tile.slots), kv_b, shape)
        if tile.sequence is not None:
            k = k.index_select(0, tile.sequence)
            v = v.index_select(0, tile.sequence)
        n = tile.num_query_tiles * H
        scores = torch.bmm(q[:n], k.reshape(n, TILE, K).transpose(1, 2))
        if tile.hidden is not None:
            scores.unflatten(0, (-1, H)).masked_fill_(tile.hidden, -torch.inf)
        new_peak = torch.maximum(peak[:n], scores.amax(-1))
        weights = scores.sub_(new_peak.unsqueeze(-1)).exp_()
        rescale = peak[:n].sub_(new_peak).exp_()
        total[:n].mul_(rescale).add_(weights.sum(-1))
        acc[:n].mul_(rescale.unsqueeze(-1)).add_(torch.bmm(weights, v.reshape(n, TILE, V)))
        peak[:n] = new_peak
    out = (acc / total.unsqueeze(-1)).unflatten(0, (-1, H)).transpose(1, 2).flatten(0, 1)
    return out.index_select(0, tiles.slot_of_row)


def _expand_tile(latents_SL: Tensor, kv_b: Tensor, shape: HeadShape) -> tuple[Tensor, Tensor]:
    """Keys [sequences, H, TILE, nope + R] and values [sequences, H, TILE, V] in fp32, TILE rows a product."""
    latent = latents_SL[:, : shape.latent].contiguous()
    kv = grouped_matmul(latent, kv_b, group=TILE).float()
    kv = kv.unflatten(1, (shape.num_heads, -1)).unflatten(0, (-1, TILE)).transpose(1, 2)
    k_pe = latents_SL[:, shape.latent :].float().unflatten(0, (-1, TILE)).unsqueeze(1)
    k_pe = k_pe.expand(-1, shape.num_heads, -1, -1)
    return torch.cat((kv[..., : shape.nope], k_pe), dim=-1), kv[..., shape.nope :]
