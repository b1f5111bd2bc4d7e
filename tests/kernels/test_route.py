"""The router against `definition.route`: the same experts in the same order, whatever other rows a step has."""

import pytest
import torch

from kernels.experts import definition
from kernels.experts.definition import RouterRule
from kernels.experts.routing import route

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
V2_LITE = RouterRule(True, 1, 6, 1, 1, False, 1.0)
V2 = RouterRule(True, 1, 6, 8, 3, False, 16.0)
V3 = RouterRule(False, 2, 8, 8, 4, True, 2.5)
TINY = RouterRule(False, 2, 2, 4, 2, True, 2.5)
RULES = [(64, V2_LITE), (160, V2), (256, V3), (16, TINY), (384, RouterRule(False, 2, 8, 1, 1, True, 2.8))]


def logits(rows: int, experts: int) -> torch.Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts)).mul_(3).to(DEVICE)


def bias_of(experts: int) -> torch.Tensor:
    return torch.randn(experts, generator=torch.Generator().manual_seed(1)).mul_(0.3).to(DEVICE)


def check(logits_NE: torch.Tensor, bias_E: torch.Tensor | None, rule: RouterRule) -> None:
    weights, ids = route(logits_NE, bias_E, rule)
    expected = definition.route(logits_NE, bias_E, rule)
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), expected.expert_ids_NA)
    rtol = 1e-6 if DEVICE.type == "cpu" else 4e-6  # on a device exp2 and divisions are approximate
    torch.testing.assert_close(weights, expected.weights_NA, rtol=rtol, atol=1e-37)


@pytest.mark.parametrize(("experts", "rule"), RULES)
@pytest.mark.parametrize("biased", [False, True])
def test_the_definition(experts: int, rule: RouterRule, biased: bool) -> None:
    check(logits(6, experts), bias_of(experts) if biased else None, rule)


@pytest.mark.parametrize(("experts", "rule"), RULES)
def test_ties_go_to_the_lower_id(experts: int, rule: RouterRule) -> None:
    few_values = logits(3, experts).div(6).round()
    few_values[0] = 0.0
    check(few_values, None, rule)


@pytest.mark.parametrize(("experts", "rule"), RULES)
def test_a_row_in_other_company_has_the_same_bits(experts: int, rule: RouterRule) -> None:
    bias, wide = bias_of(experts), torch.full((5, experts + 4), torch.nan, device=DEVICE)
    rows = wide[:, :experts]
    rows.copy_(logits(5, experts))
    weights, ids = route(rows, bias, rule)
    order = torch.tensor([4, 0])
    some_weights, some_ids = route(rows[order], bias, rule)
    assert torch.equal(some_weights, weights[order])
    assert torch.equal(some_ids, ids[order])


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(("experts", "rule"), RULES)
def test_a_row_that_is_not_finite_still_names_experts(experts: int, rule: RouterRule) -> None:
    rows = logits(5, experts)
    rows[0] = torch.nan
    rows[1, experts // 2] = torch.nan
    rows[2, 3], rows[2, 4] = torch.inf, -torch.inf
    rows[3] = -torch.inf
    weights, ids = route(rows, None, rule)
    assert ((ids >= 0) & (ids < experts)).all()
    assert all(row.unique().numel() == rule.num_chosen for row in ids)
    assert weights[:2].isnan().any(1).all()
    assert weights[4].isfinite().all()


def test_a_rule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 60 experts"):
        route(logits(1, 60), None, V3)
    with pytest.raises(ValueError, match="chooses over 8"):
        route(logits(1, 64), None, V2_LITE._replace(num_chosen=9))
    assert route(logits(0, 64), None, V2_LITE)[1].shape == (0, 6)
