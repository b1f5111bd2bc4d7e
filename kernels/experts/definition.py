"""A mixture of experts in plain torch: the choice of experts, and their weighted sum.

Shapes: N rows of a step, padded to its group; B rows that are real; D hidden size; E experts; A experts per token.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.elementwise.definition import swiglu

EXPERT_GROUP = 16  # rows of one expert product


class RouterRule(NamedTuple):
    """Constants of a mixture's choice; see `route`."""

    softmax: bool  # scores by softmax over all experts (DeepSeek-V2); False: a sigmoid each (DeepSeek-V3)
    group_best: int  # a group scores as the sum of its experts' highest scores, this many of them
    num_chosen: int
    num_groups: int
    num_groups_chosen: int
    normalise: bool
    scale: float


class ChosenExperts(NamedTuple):
    weights_NA: Tensor  # fp32
    expert_ids_NA: Tensor  # int64, best first, ties to the lower id


def route(logits_NE: Tensor, bias_E: Tensor | None, rule: RouterRule) -> ChosenExperts:
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
    return ChosenExperts(weights_NA.mul_(rule.scale), ids_NA)


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


def expert_mlps(x_ND: Tensor, routing: ChosenExperts, gate_up: Matrices, down: Matrices) -> Tensor:
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
    groups = []
    rows = []
    slots = [0] * (len(expert_ids_NA) * len(expert_ids_NA[0]))
    for expert in sorted(places):
        for slot, (place, _) in enumerate(places[expert], start=len(rows)):
            slots[place] = slot
        padding = -len(places[expert]) % EXPERT_GROUP  # repeats row 0, whose result there is not read
        rows += [row for _, row in places[expert]] + [0] * padding
        groups += [expert] * ((len(places[expert]) + padding) // EXPERT_GROUP)
    return _ExpertGroups(groups, rows, slots)
