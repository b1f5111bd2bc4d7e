"""Plain-torch definitions of the operations on the token path, written so that rows never see each other.

Every product has one fixed shape per role: `group` rows at a time, or a batch of equal small products. A library picks
its algorithm, and with it the order of summation, from the shape: in MKL [N, 1000] @ [1000, 700] gives other bits from
N = 256 on, although N is a multiple of 16. Elementwise work uses only operations whose bits do not depend on where in a
tensor an element lies (no sigmoid, silu, softplus); sums run along contiguous rows or in a written order. The factors
of a batch of products lie at multiples of 16 bytes: elsewhere MKL's kernels for AMD processors give other bits.

Shapes: N rows of a step, padded to its group; B rows that are real; D hidden size; H heads; K query/key elements of a
head; C latent rank; R rotary elements; L = C + R; V value elements of a head; E experts; A experts per token; S cache
slots; P (row, tile) pairs; T tiles.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

TILE = 64  # positions a tile of keys covers, at absolute positions; block sizes divide it
DECODE_GROUP = 16  # rows of one product in a decode step; prefill takes TILE rows
EXPERT_GROUP = 16  # rows of one expert product
MIN_PAIRS = 2  # of a decode step: a batch of one product may take another kernel
FP8_BLOCK = 128  # rows and columns that share a scale in FP8 checkpoints


def grouped_matmul(x_NK: Tensor, weight_KM: Tensor, *, group: int) -> Tensor:
    """x @ weight in products of exactly `group` rows; N is a multiple of it. Returns [N, M]."""
    if x_NK.shape[0] == group:
        return torch.mm(x_NK, weight_KM)
    out_NM = x_NK.new_empty(x_NK.shape[0], weight_KM.shape[1])
    for rows, out in zip(x_NK.split(group), out_NM.split(group), strict=True):
        torch.mm(rows, weight_KM, out=out)
    return out_NM


def grouped_affine(x_NK: Tensor, weight_KM: Tensor, bias_M: Tensor, *, group: int) -> Tensor:
    """The same plus a bias, rounded once."""
    return torch.cat([torch.addmm(bias_M, rows, weight_KM) for rows in x_NK.split(group)])


def dequantise(fp8_MK: Tensor, scales_MB: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a block-FP8 matrix: every run of FP8_BLOCK elements of a row has its scale, the last run may be short."""
    scales_MK = scales_MB.float().repeat_interleave(FP8_BLOCK, dim=-1).narrow(-1, 0, fp8_MK.shape[-1])
    return scales_MK.mul_(fp8_MK.float()).to(dtype)


def grouped_head_matmul(x_NHK: Tensor, weight_HKM: Tensor, *, group: int) -> Tensor:
    """Each head's rows times that head's weight, `group` rows at a time. Returns [H, N, M]."""
    x_HNK = x_NHK.transpose(0, 1)
    if x_NHK.shape[0] == group:
        return torch.bmm(x_HNK, weight_HKM)
    return torch.cat([torch.bmm(rows, weight_HKM) for rows in x_HNK.split(group, dim=1)], dim=1)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalised in fp32, cast to x's dtype, then scaled in it, as transformers does."""
    x32 = x.float()
    mean_square = (x32 * x32).sum(-1, keepdim=True).mul_(1.0 / x.shape[-1])
    return (x32 / mean_square.add_(eps).sqrt_()).to(x.dtype) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 * width], gate first; computed in fp32."""
    width = gate_up.shape[-1] // 2
    x = gate_up.float()
    gate = x.narrow(-1, 0, width)
    return (gate / (-gate).exp_().add_(1.0)).mul_(x.narrow(-1, width, width)).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding of [..., R] whose halves are the pairs' first and second elements; fp32.

    `cos` repeats the angles for both halves; `signed_sin` is -sin, then +sin.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


class RouterRule(NamedTuple):
    """Constants of a mixture's choice; see `route`."""

    softmax: bool  # scores by softmax over all experts (DeepSeek-V2); False: a sigmoid each (DeepSeek-V3)
    group_best: int  # a group scores as the sum of its best so many experts
    num_chosen: int
    num_groups: int
    num_groups_chosen: int
    normalise: bool
    scale: float


class Routing(NamedTuple):
    weights_NA: Tensor  # fp32
    expert_ids_NA: Tensor  # int64, best first, ties to the lower id


def route(logits_NE: Tensor, bias_E: Tensor | None, rule: RouterRule) -> Routing:
    """The best experts of the best groups. A bias counts for the choice, not for the weights. fp32 in and out."""
    if rule.softmax:
        scores_NE = (logits_NE - logits_NE.amax(-1, keepdim=True)).exp_()
        scores_NE /= scores_NE.sum(-1, keepdim=True)
    else:
        scores_NE = (-logits_NE).exp_().add_(1.0).reciprocal_()
    choice_NE = scores_NE if bias_E is None else scores_NE + bias_E
    if rule.num_groups_chosen < rule.num_groups:
        # The best values are the same whichever of equal experts gives them, so topk's order of ties is no matter.
        grouped = choice_NE.view(-1, rule.num_groups, choice_NE.shape[1] // rule.num_groups)
        choice_NE = _of_chosen_groups(choice_NE, grouped.topk(rule.group_best, dim=-1).values.sum(-1), rule)
    ids_NA = _best(choice_NE, rule.num_chosen)
    weights_NA = scores_NE.gather(-1, ids_NA)
    if rule.normalise:
        weights_NA /= weights_NA.sum(-1, keepdim=True).add_(1e-20)
    return Routing(weights_NA.mul_(rule.scale), ids_NA)


def _best(scores_NE: Tensor, count: int) -> Tensor:
    """Ids of the highest scores, best first; equal ones by lower id."""
    return scores_NE.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, count)


def _of_chosen_groups(scores_NE: Tensor, group_scores_NG: Tensor, rule: RouterRule) -> Tensor:
    """Scores with -inf for experts outside the best groups; x + 0 keeps the others' values."""
    chosen = _best(group_scores_NG, rule.num_groups_chosen)
    penalty_NG = torch.full_like(group_scores_NG, -torch.inf).scatter_(-1, chosen, 0.0)
    grouped = scores_NE.view(-1, rule.num_groups, scores_NE.shape[1] // rule.num_groups)
    return (grouped + penalty_NG.unsqueeze(-1)).view_as(scores_NE)


class Matrices(Protocol):
    """A sequence of matrices, or what makes them when they are asked for."""

    def __getitem__(self, index: int, /) -> Tensor: ...


def expert_mlps(x_ND: Tensor, routing: Routing, gate_up: Matrices, down: Matrices) -> Tensor:
    """Weighted sum of the experts of the first B rows, which `routing` holds, in its order. Returns [B, D] fp32.

    Rows are grouped by expert, EXPERT_GROUP rows a product; `gate_up[e]` is [D, 2 * width], `down[e]` [width, D].
    """
    groups = _group_by_expert(routing.expert_ids_NA.tolist(), x_ND.shape[0])
    if groups.rows is None:
        blocks: Sequence[Tensor] = [x_ND] * len(groups.experts)
    else:
        blocks = x_ND.index_select(0, torch.tensor(groups.rows, device=x_ND.device)).split(EXPERT_GROUP)
    hidden = torch.cat([torch.mm(block, gate_up[e]) for block, e in zip(blocks, groups.experts, strict=True)])
    blocks = swiglu(hidden).split(EXPERT_GROUP)
    y_SD = torch.cat([torch.mm(block, down[e]) for block, e in zip(blocks, groups.experts, strict=True)])
    weights_NA = routing.weights_NA
    y = y_SD.index_select(0, torch.tensor(groups.slots, device=x_ND.device))
    y_NAD = y.view(*weights_NA.shape, -1) * weights_NA.unsqueeze(-1)
    total, *others = y_NAD.unbind(1)
    for other in others:
        total = total + other
    return total


class _ExpertGroups(NamedTuple):
    experts: list[int]  # of each group
    rows: list[int] | None  # row behind each slot, group after group; None: every group is the step's rows as they are
    slots: list[int]  # slot of choice a of row b, at b * A + a


def _group_by_expert(expert_ids_NA: list[list[int]], num_step_rows: int) -> _ExpertGroups:
    """Integers on the host: a product is launched per group, so their number is needed here."""
    if num_step_rows == EXPERT_GROUP:
        experts = sorted({expert for chosen in expert_ids_NA for expert in chosen})
        first_slot = {expert: group * EXPERT_GROUP for group, expert in enumerate(experts)}
        slots = [first_slot[expert] + row for row, chosen in enumerate(expert_ids_NA) for expert in chosen]
        return _ExpertGroups(experts, None, slots)
    places: dict[int, list[tuple[int, int]]] = {}
    for row, chosen in enumerate(expert_ids_NA):
        for place, expert in enumerate(chosen, start=row * len(chosen)):
            places.setdefault(expert, []).append((place, row))
    groups, rows, slots = [], [], [0] * (len(expert_ids_NA) * len(expert_ids_NA[0]))
    for expert in sorted(places):
        for slot, (place, _) in enumerate(places[expert], start=len(rows)):
            slots[place] = slot
        padding = -len(places[expert]) % EXPERT_GROUP  # repeats row 0, whose result there is not read
        rows += [row for _, row in places[expert]] + [0] * padding
        groups += [expert] * ((len(places[expert]) + padding) // EXPERT_GROUP)
    return _ExpertGroups(groups, rows, slots)


def write_latents(cache_SL: Tensor, slots_B: Tensor, latent_BC: Tensor, k_pe_BR: Tensor) -> None:
    """Stores rows of [latent | rotated key] in the cache's dtype at their slots."""
    cache_SL.index_copy_(0, slots_B, torch.cat((latent_BC.to(cache_SL.dtype), k_pe_BR.to(cache_SL.dtype)), dim=-1))


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
    H, K, V = shape.num_heads, shape.nope + shape.rope, shape.value
    q = q_NHK.index_select(0, tiles.rows).unflatten(0, (-1, TILE)).transpose(1, 2).reshape(-1, TILE, K)
    peak, total, acc = q.new_full(q.shape[:2], -torch.inf), q.new_zeros(q.shape[:2]), q.new_zeros(*q.shape[:2], V)
    for tile in tiles.keys:
        k, v = _expand_tile(cache_SL.index_select(0, tile.slots), kv_b, shape)
        if tile.sequence is not None:
            k, v = k.index_select(0, tile.sequence), v.index_select(0, tile.sequence)
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
