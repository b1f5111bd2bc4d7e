"""The choice of experts: one program per row, which holds the row's scores as [groups, experts of a group].

The best of several is found by its value, then by the lowest id that has it: A times, A being at most 8.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require
from kernels.experts.definition import RouterRule
from kernels.table import Config, KernelSource, KernelSources, lookup

MAX_CHOICES = 8
_SIZES = (16, 64, 256, 512)  # scores a program holds, each with its own entry in the table


@triton.jit
def _best_of(value, candidate, id, none):
    """The candidate with the highest value, the lowest id of equals; `none` where there is no candidate."""
    best = tl.max(tl.where(candidate, value, float("-inf")))
    return tl.min(tl.where(candidate & (value == best), id, none))


@triton.jit
def _of_best_groups(choice, real, group, member, num_groups, BEST: tl.constexpr, CHOSEN: tl.constexpr):
    """Which experts are in the CHOSEN groups whose BEST highest choice scores have the highest sums."""
    total = tl.zeros_like(group).to(tl.float32)
    candidate = real
    for _ in tl.static_range(BEST):
        best = tl.max(tl.where(candidate, choice, float("-inf")), axis=1)
        at = tl.min(tl.where(candidate & (choice == best[:, None]), member[None, :], real.shape[1]), axis=1)
        candidate = candidate & (member[None, :] != at[:, None])
        total += best
    total = tl.where(total == total, total, float("inf"))
    rest = group < num_groups
    for _ in tl.static_range(CHOSEN):
        rest = rest & (group != _best_of(total, rest, group, num_groups))
    return real & (rest == 0)[:, None]


@triton.jit
def route_kernel(
    weights, ids, logits, bias, logits_stride, num_groups, group_size, scale,
    SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, CHOSEN: tl.constexpr,
    GROUP_BEST: tl.constexpr, CHOSEN_GROUPS: tl.constexpr,  # no groups: CHOSEN_GROUPS is 0
    GROUPS: tl.constexpr, GROUP: tl.constexpr,  # powers of two that hold num_groups and group_size
):  # fmt: skip
    """A NaN score counts as the highest, so ids are always those of experts; the row's weights say what happened."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, GROUP)
    real = (group < num_groups)[:, None] & (member < group_size)[None, :]
    expert = group[:, None] * group_size + member[None, :]
    logit = tl.load(logits + row * logits_stride + expert, mask=real, other=float("-inf"))
    if SOFTMAX:
        score = tl.exp(logit - tl.max(logit))
        score = score / tl.sum(score)
    else:
        score = 1.0 / (1.0 + tl.exp(-tl.where(real, logit, 0.0)))
    choice = score
    if bias is not None:
        choice += tl.load(bias + expert, mask=real, other=0.0)
    choice = tl.where(choice == choice, choice, float("inf"))
    candidate = real
    if CHOSEN_GROUPS:
        candidate = _of_best_groups(choice, real, group, member, num_groups, GROUP_BEST, CHOSEN_GROUPS)
    place = tl.arange(0, 8)
    row_weights = tl.zeros([8], tl.float32)
    row_ids = tl.zeros([8], tl.int32)
    total = 0.0
    for c in tl.static_range(CHOSEN):
        best = _best_of(choice, candidate, expert, num_groups * group_size)
        chosen = real & (expert == best)
        candidate = candidate & (expert != best)
        weight = tl.sum(tl.where(chosen, score, 0.0))
        total += weight
        row_weights = tl.where(place == c, weight, row_weights)
        row_ids = tl.where(place == c, best, row_ids)
    if NORMALISE:
        row_weights = row_weights / (total + 1e-20)
    tl.store(weights + row * CHOSEN + place, row_weights * scale, mask=place < CHOSEN)
    tl.store(ids + row * CHOSEN + place, row_ids, mask=place < CHOSEN)


def route(
    logits_NE: Tensor, bias_E: Tensor | None, rule: RouterRule, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """`definition.route` of fp32 logits, rows of which may lie apart: weights [N, A] fp32, ids [N, A] int32.

    Ids are best first, ties to the lower id. Raises ValueError for a rule that does not fit E, or A over 8.
    """
    require("logits_NE", logits_NE, (None, None), torch.float32)
    num_rows, num_experts = logits_NE.shape
    if logits_NE.stride(1) != 1:
        raise ValueError(f"logits_NE has strides {logits_NE.stride()}: rows must be contiguous")
    if bias_E is not None:
        require("bias_E", bias_E, (num_experts,), torch.float32)
    groups, group_size, chosen_groups = _groups(rule, num_experts)
    weights_NA = logits_NE.new_empty(num_rows, rule.num_chosen)
    ids_NA = weights_NA.new_empty(weights_NA.shape, dtype=torch.int32)
    if num_rows:
        blocks = triton.next_power_of_2(groups), triton.next_power_of_2(group_size)
        config = config or lookup("route", _variant(blocks[0] * blocks[1]), logits_NE.device)
        operands = (weights_NA, ids_NA, logits_NE, bias_E, logits_NE.stride(0), groups, group_size, rule.scale)
        constants = (rule.softmax, rule.normalise, rule.num_chosen, rule.group_best, chosen_groups)
        route_kernel[(num_rows,)](*operands, *constants, *blocks, **config.launch)
    return weights_NA, ids_NA


def _groups(rule: RouterRule, num_experts: int) -> tuple[int, int, int]:
    """(groups, experts of each, groups to choose); a rule that chooses all groups has one, and chooses none."""
    grouped = rule.num_groups_chosen < rule.num_groups
    groups = rule.num_groups if grouped else 1
    size = num_experts // groups
    available = size * (rule.num_groups_chosen if grouped else 1)
    fits = groups * size == num_experts and rule.num_chosen <= min(available, MAX_CHOICES)
    if not fits or (grouped and not 1 <= rule.group_best <= size):
        raise ValueError(f"{rule} does not fit {num_experts} experts, or chooses over {MAX_CHOICES}")
    return groups, size, rule.num_groups_chosen if grouped else 0


def _variant(scores: int) -> str:
    return f"experts={next((size for size in _SIZES if scores <= size), scores)}"


def _source(fields: Mapping[str, str]) -> KernelSource:
    """Every size with the rule of a model that has it: groups, experts of each, and the rest as in a launch."""
    groups, size, softmax, chosen, best, chosen_groups = {
        16: (4, 4, False, 2, 2, 2),
        64: (1, 64, True, 6, 1, 0),
        256: (8, 32, False, 8, 2, 4),
        512: (1, 512, False, 8, 1, 0),
    }[int(fields["experts"])]
    pointers = {"weights": "*fp32", "ids": "*i32", "logits": "*fp32", "bias": "*fp32"}
    numbers = {"logits_stride": "i32", "num_groups": "i32", "group_size": "i32", "scale": "fp32"}
    constants = {"SOFTMAX": softmax, "NORMALISE": not softmax, "CHOSEN": chosen, "GROUP_BEST": best}
    constants |= {"CHOSEN_GROUPS": chosen_groups, "GROUPS": groups, "GROUP": size}
    return KernelSource(route_kernel, {**pointers, **numbers}, constants, (*pointers, "logits_stride"))


SOURCES: KernelSources = {"route": _source}
