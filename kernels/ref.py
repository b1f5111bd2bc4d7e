"""Plain-torch definitions of the operations on the token path, written so that rows never see each other.

Every product has one fixed shape per role: `group` rows at a time (a library picks its algorithm, and with it the order of
summation, from the shape), or a batch of equal small products. Elementwise work uses only operations whose bits do not
depend on where in a tensor an element lies (no sigmoid, silu, softplus); sums run along contiguous rows or in a written order.

Shapes: N rows of a step, padded to its group; B rows that are real; D hidden size; H heads; K query/key elements of a head;
C latent rank; R rotary elements; V value elements of a head; E experts; A experts per token; S cache slots; P (row, tile) pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64  # positions a tile of keys covers, at absolute positions; block sizes divide it
DECODE_GROUP = 16  # rows of one product in a decode step; prefill takes TILE rows
EXPERT_GROUP = 16  # rows of one expert product


def grouped_matmul(x_NK: Tensor, weight_KM: Tensor, *, group: int) -> Tensor:
    """x @ weight in products of exactly `group` rows; N is a multiple of it. Returns [N, M]."""
    if x_NK.shape[0] == group:
        return torch.mm(x_NK, weight_KM)
    out_NM = x_NK.new_empty(x_NK.shape[0], weight_KM.shape[1])
    for rows, out in zip(x_NK.split(group), out_NM.split(group), strict=True):
        torch.mm(rows, weight_KM, out=out)
    return out_NM


def grouped_head_matmul(x_NHK: Tensor, weight_HKM: Tensor, *, group: int) -> Tensor:
    """Each head's rows times that head's weight, `group` rows at a time. Returns [N, H, M]."""
    parts = [torch.bmm(rows.transpose(0, 1), weight_HKM) for rows in x_NHK.split(group)]
    out_HNM = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out_HNM.transpose(0, 1)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalised in fp32, cast to x's dtype, then scaled in it, as transformers does."""
    x32 = x.float()
    x32 = x32 / (x32 * x32).mean(-1, keepdim=True).add_(eps).sqrt_()
    return x32.to(x.dtype) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 * width], gate first; computed in fp32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / torch.exp(-gate).add_(1.0) * up).to(gate_up.dtype)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding of [..., R] whose halves are the pairs' first and second elements; fp32.

    `cos` repeats the angles for both halves; `signed_sin` is -sin, then +sin.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


class RouterRule(NamedTuple):
    """Constants of a mixture's choice; see `route_softmax` and `route_sigmoid_bias`."""

    num_chosen: int
    num_groups: int
    num_groups_chosen: int
    normalise: bool
    scale: float


class Routing(NamedTuple):
    weights_NA: Tensor  # fp32
    expert_ids_NA: Tensor  # int64, best first, ties to the lower id


def route_softmax(logits_NE: Tensor, rule: RouterRule) -> Routing:
    """DeepSeek-V2: the best experts by softmax score, of the groups with the best single experts. fp32 in and out."""
    exp_NE = torch.exp(logits_NE - logits_NE.amax(-1, keepdim=True))
    scores_NE = exp_NE / exp_NE.sum(-1, keepdim=True)
    choice_NE = scores_NE
    if rule.num_groups_chosen < rule.num_groups:
        group_scores = scores_NE.unflatten(-1, (rule.num_groups, -1)).amax(-1)
        choice_NE = scores_NE.masked_fill(_outside_groups(group_scores, scores_NE.shape[-1], rule), 0.0)
    ids_NA = _best(choice_NE, rule.num_chosen)
    return Routing(choice_NE.gather(-1, ids_NA) * rule.scale, ids_NA)


def route_sigmoid_bias(logits_NE: Tensor, bias_E: Tensor, rule: RouterRule) -> Routing:
    """DeepSeek-V3: sigmoid scores; the bias counts for the choice, not for the weights. fp32 in and out."""
    scores_NE = 1.0 / torch.exp(-logits_NE).add_(1.0)
    choice_NE = scores_NE + bias_E
    if rule.num_groups_chosen < rule.num_groups:
        best = choice_NE.unflatten(-1, (rule.num_groups, -1)).sort(dim=-1, descending=True, stable=True).values
        group_scores = best[..., 0] + best[..., 1]
        choice_NE = choice_NE.masked_fill(_outside_groups(group_scores, choice_NE.shape[-1], rule), -torch.inf)
    ids_NA = _best(choice_NE, rule.num_chosen)
    weights_NA = scores_NE.gather(-1, ids_NA)
    if rule.normalise:
        weights_NA = weights_NA / (sum_in_order(weights_NA) + 1e-20).unsqueeze(-1)
    return Routing(weights_NA * rule.scale, ids_NA)


def _best(scores_NE: Tensor, count: int) -> Tensor:
    return scores_NE.sort(dim=-1, descending=True, stable=True).indices[:, :count].contiguous()


def _outside_groups(group_scores_NG: Tensor, num_experts: int, rule: RouterRule) -> Tensor:
    """True for experts outside the chosen groups. Shape [N, E]."""
    chosen = _best(group_scores_NG, rule.num_groups_chosen)
    outside_NG = torch.ones_like(group_scores_NG, dtype=torch.bool).scatter_(-1, chosen, False)  # noqa: FBT003
    return outside_NG.repeat_interleave(num_experts // rule.num_groups, dim=-1)


def sum_in_order(x: Tensor) -> Tensor:
    """Sum over the last dimension, first to last."""
    columns = x.unbind(-1)
    total = columns[0]
    for column in columns[1:]:
        total = total + column
    return total


def expert_mlps(x_BD: Tensor, routing: Routing, gate_up: Sequence[Tensor], down: Sequence[Tensor]) -> Tensor:
    """Weighted sum of each row's experts, in fp32 and in the routing's order. Returns [B, D] fp32.

    Rows are grouped by expert, each group padded to EXPERT_GROUP rows; `gate_up[e]` is [D, 2 * width], `down[e]` [width, D].
    """
    groups = _group_by_expert(routing.expert_ids_NA, len(gate_up))
    x_SD = x_BD.index_select(0, groups.rows.to(x_BD.device))
    gate_up_SW = x_BD.new_empty(x_SD.shape[0], gate_up[0].shape[1])
    for expert, rows, out in zip(groups.experts, x_SD.split(EXPERT_GROUP), gate_up_SW.split(EXPERT_GROUP), strict=True):
        torch.mm(rows, gate_up[expert], out=out)
    hidden_SW = swiglu(gate_up_SW)
    y_SD = torch.empty_like(x_SD)
    for expert, rows, out in zip(groups.experts, hidden_SW.split(EXPERT_GROUP), y_SD.split(EXPERT_GROUP), strict=True):
        torch.mm(rows, down[expert], out=out)
    y_ABD = y_SD.index_select(0, groups.slots.to(x_BD.device)).unflatten(0, (-1, x_BD.shape[0]))
    parts = (y_ABD * routing.weights_NA.t().unsqueeze(-1)).unbind(0)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _ExpertGroups(NamedTuple):
    experts: list[int]  # of each group
    rows: Tensor  # row behind each slot, groups one after the other; padding repeats row 0, its result is not read
    slots: Tensor  # slot of choice a of row b, at a * B + b


def _group_by_expert(expert_ids_BA: Tensor, num_experts: int) -> _ExpertGroups:
    """Integer work on the CPU: exact, and the number of groups is needed there."""
    num_rows = expert_ids_BA.shape[0]
    flat = expert_ids_BA.t().flatten().cpu()
    by_expert, order = flat.sort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    groups = (counts + (EXPERT_GROUP - 1)) // EXPERT_GROUP
    # Where an expert's slots start, less where its choices start among all choices in order.
    shift = (groups.cumsum(0) - groups) * EXPERT_GROUP - (counts.cumsum(0) - counts)
    slots = torch.empty_like(flat).index_copy_(0, order, torch.arange(flat.numel()) + shift[by_expert])
    num_groups = groups.tolist()
    rows = flat.new_zeros(sum(num_groups) * EXPERT_GROUP).index_copy_(0, slots, torch.arange(flat.numel()) % num_rows)
    return _ExpertGroups([e for e, count in enumerate(num_groups) for _ in range(count)], rows, slots)


def write_latents(cache_SL: Tensor, slots_B: Tensor, latent_BC: Tensor, k_pe_BR: Tensor) -> None:
    """Stores rows of [latent | rotated key] in the cache's dtype at their slots."""
    cache_SL.index_copy_(0, slots_B, torch.cat((latent_BC.to(cache_SL.dtype), k_pe_BR.to(cache_SL.dtype)), dim=-1))


class DecodePairs(NamedTuple):
    """The (row, tile) pairs of a decode step: tile 0 of every row, then tile 1 of the rows that have one, …

    Rows stand in descending order of their number of tiles, so the rows that have a tile are a prefix.
    """

    slots: Tensor  # [P * TILE] cache slot of each key; hidden keys name the cache's last slot, which holds zeros
    hidden: Tensor  # [P, 1, TILE] bool: the key is past the row's own position
    row: Tensor  # [P]
    of_row: Tensor  # [B, T] pair of a row's tile, P where the row has no such tile
    rows_with_tile: tuple[int, ...]  # B first, never growing


def paged_mla_decode(q_BHL: Tensor, cache_SL: Tensor, pairs: DecodePairs, *, latent_rank: int) -> Tensor:
    """Absorbed attention: queries [H, C + R], already scaled, over latents as stored. Returns [B, H, C] in fp32.

    Each pair gives (max, sum, weighted latents); a row's partials are folded by tile, in order.
    """
    tiles = cache_SL.index_select(0, pairs.slots).float().unflatten(0, (-1, TILE))
    scores = torch.bmm(q_BHL.index_select(0, pairs.row), tiles.transpose(1, 2)).masked_fill_(pairs.hidden, -torch.inf)
    peak_PH = scores.amax(-1)
    weights = scores.sub_(peak_PH.unsqueeze(-1)).exp_()
    sum_PH1 = weights.sum(-1, keepdim=True)
    partial = torch.cat((torch.bmm(weights, tiles[:, :, :latent_rank]), sum_PH1), dim=-1)
    if len(pairs.rows_with_tile) > 1:
        partial = _fold_by_tile(partial, peak_PH, pairs)
    return partial[..., :latent_rank] / partial[..., latent_rank:]


def _fold_by_tile(partial_PHC: Tensor, peak_PH: Tensor, pairs: DecodePairs) -> Tensor:
    """Rescales each partial to its row's maximum (a maximum is exact in any order) and adds tile after tile."""
    no_tile = peak_PH.new_full((1, peak_PH.shape[1]), -torch.inf)
    peaks_BTH = torch.cat((peak_PH, no_tile)).index_select(0, pairs.of_row.flatten()).unflatten(0, pairs.of_row.shape)
    rescale_PH = (peak_PH - peaks_BTH.amax(1).index_select(0, pairs.row)).exp_()
    partial_PHC = partial_PHC * rescale_PH.unsqueeze(-1)
    first, *later = partial_PHC.split(pairs.rows_with_tile)
    for tile in later:
        first[: tile.shape[0]].add_(tile)
    return first


class KeyTile(NamedTuple):
    """One tile index of a prefill step, for the sequences that reach it."""

    slots: Tensor  # [sequences * TILE], as in DecodePairs
    sequence: Tensor | None  # [Q] which of the sequences a query tile reads; None: one query tile each, in order
    hidden: Tensor | None  # [Q, 1, TILE, TILE] bool: the key is past the query; None: no query tile ends here
    num_query_tiles: int  # query tiles that see this tile are a prefix


class PrefillTiles(NamedTuple):
    """Queries arranged in tiles at absolute positions, those with most key tiles first."""

    rows: Tensor  # [query tiles * TILE] row of the step; positions outside the chunk name row 0, their result is not read
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

    `kv_b` is [C, H * (nope + V)]; queries come scaled. Query tiles of TILE rows meet key tiles of TILE rows, folded in order.
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
