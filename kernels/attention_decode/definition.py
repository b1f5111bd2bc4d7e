"""Absorbed attention in plain torch: a decode step's queries over the latents as they are stored.

Shapes: B rows that are real; H heads; C latent rank; R rotary elements; L = C + R; S cache slots; P (row, tile) pairs;
T tiles.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.shapes import TILE

MIN_PAIRS = 2  # of a decode step: a batch of one product may take another kernel


class DecodePairs(NamedTuple):
    """The (row, tile) pairs of a decode step: tile 0 of every row, then tile 1 of the rows that have one, …

    Rows stand in descending order of their number of tiles, so the rows that have a tile are a prefix. A single pair
    is there MIN_PAIRS times; only the first is read.
    """

    slots: Tensor  # [P * TILE] cache slot of each key; hidden keys name the cache's last slot, which holds zeros
    hidden: Tensor  # [P, 1, TILE] bool: the key is past the row's own position
    row: Tensor  # [P]
    of_row: Tensor  # [T * B] pair of a row's tile, tiles outermost; P where the row has no such tile
    rows_with_tile: tuple[int, ...]  # B first, never growing


def paged_mla_decode(q_BLH: Tensor, cache_SL: Tensor, pairs: DecodePairs, *, latent_rank: int) -> Tensor:
    """Absorbed attention: queries of C + R elements, already scaled, over latents as stored. Returns [B, H, C] in fp32.

    Each pair gives (max, sum, weighted latents); a row's partials are folded by tile, in order.
    """
    num_heads = q_BLH.shape[2]
    if num_heads % 4:  # keeps every pair's queries at a multiple of 16 bytes
        q_BLH = torch.nn.functional.pad(q_BLH, (0, -num_heads % 4))
    tiles = cache_SL.index_select(0, pairs.slots).float().view(-1, TILE, cache_SL.shape[1])
    # Keys times queries, then transposed: the other way round is two to five times slower in MKL for few heads.
    scores = torch.bmm(tiles, q_BLH.index_select(0, pairs.row)).transpose(1, 2).contiguous()
    scores.masked_fill_(pairs.hidden, -torch.inf)
    peak_PH1 = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak_PH1).exp_()
    partial = torch.bmm(weights, tiles)  # the rotary columns carry nothing; the first of them takes the sum
    partial.narrow(-1, latent_rank, 1).copy_(weights.sum(-1, keepdim=True))
    if len(pairs.rows_with_tile) > 1:
        partial = _fold_by_tile(partial, peak_PH1, pairs)
    partial = partial[: pairs.rows_with_tile[0], :num_heads]
    return partial.narrow(-1, 0, latent_rank) / partial.narrow(-1, latent_rank, 1)


def _fold_by_tile(partial_PHL: Tensor, peak_PH1: Tensor, pairs: DecodePairs) -> Tensor:
    """Rescales each partial to its row's maximum (a maximum is exact in any order) and adds tile after tile."""
    no_tile = peak_PH1.new_full((1, *peak_PH1.shape[1:]), -torch.inf)
    peaks = torch.cat((peak_PH1, no_tile)).index_select(0, pairs.of_row)
    peaks_BH1 = peaks.view(len(pairs.rows_with_tile), -1, *peak_PH1.shape[1:]).amax(0)
    partial_PHL *= (peak_PH1 - peaks_BH1.index_select(0, pairs.row)).exp_()
    first, *later = partial_PHL.split(pairs.rows_with_tile)
    for tile in later:
        first.narrow(0, 0, tile.shape[0]).add_(tile)
    return first
