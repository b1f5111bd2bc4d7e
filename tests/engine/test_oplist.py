"""The token path dispatches listed operations only, and the rounded ones give a row the same bits in every batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.engine.sampler import sample
from isthmus.steps import DecodeRow, PrefillChunk, SamplingInput
from isthmus.types import Request, SamplingParams
from kernels.elementwise.definition import rms_norm, swiglu
from kernels.experts import definition
from kernels.experts.definition import ChosenExperts, RouterRule, expert_mlps
from kernels.latents.definition import rotate
from kernels.products.definition import grouped_affine, grouped_head_matmul, grouped_matmul
from tests.engine.engines import bundled_engine, prompt
from tests.engine.oplist import ALLOWED

ODD_WIDTHS = (1, 3, 7, 13, 24, 33, 57, 64, 100, 192, 257)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.add(f"aten.{func.overloadpacket.__name__}" if func.namespace == "aten" else str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_token_path_uses_listed_operations_only(dtype: str):
    engine = bundled_engine(dtype, 16)
    sampled = [
        SamplingParams(max_tokens=8, temperature=0.0, logprobs=3),
        SamplingParams(max_tokens=8, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.1, logit_bias=((5, 1.0),)),
    ]
    with _Recorder() as recorder:
        engine.runner.prefill(
            [
                PrefillChunk(prompt(150), 0, range(10), needs_logits=True),
                PrefillChunk(prompt(40), 0, range(10, 20), needs_logits=True),
            ]
        )
        rows = [DecodeRow(3, 150 + i, range(20)) for i in range(20)] + [DecodeRow(3, 40, range(20, 40))]
        logits = engine.runner.decode(rows)
        inputs = [SamplingInput(Request("r", 1, (1, 2), sampling), token_ids=(3,)) for sampling in (*sampled, *sampled)]
        sample(logits[:4], inputs)
    assert sorted(recorder.names - set(ALLOWED)) == []


def _rule(**changes: Any) -> RouterRule:
    rule = RouterRule(
        softmax=False, group_best=2, num_chosen=3, num_groups=4, num_groups_chosen=2, normalise=True, scale=2.5
    )
    return rule._replace(**changes)


def test_softmax_routers_use_listed_operations_only():
    with _Recorder() as recorder:
        definition.route(torch.randn(16, 8), None, _rule(softmax=True))
    assert sorted(recorder.names - set(ALLOWED)) == ["aten.randn"]


def _row_functions(width: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Functions of [rows, width] whose rows must not see each other."""
    weight = torch.randn(width)
    return {
        "exp": lambda x: x.clone().exp_(),
        "sum": lambda x: x.sum(-1, keepdim=True),
        "rms_norm": lambda x: rms_norm(x, weight, eps=1e-6),
        "swiglu": lambda x: swiglu(torch.cat((x, x.flip(-1)), dim=-1)),
        "rotate": lambda x: rotate(x, weight.cos(), weight.sin()),
        "rotate in bf16": lambda x: rotate(x.bfloat16(), weight.cos().bfloat16(), weight.sin().bfloat16()),
        "reciprocal": lambda x: x.reciprocal(),
        "softmax weights": lambda x: (x - x.amax(-1, keepdim=True)).exp_(),
    }


@pytest.mark.parametrize("width", ODD_WIDTHS)
def test_rows_of_row_functions_do_not_see_one_another(width: int):
    torch.manual_seed(width)
    x = torch.randn(256, width) * 4
    for name, function in _row_functions(width).items():
        alone = torch.cat([function(row) for row in x.split(1)])
        for count in range(1, 257):
            assert torch.equal(function(x[:count]), alone[:count]), f"{name}, width {width}, {count} rows"


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("group_best", [1, 2])
def test_routing_of_a_row_does_not_depend_on_the_batch(softmax: bool, group_best: int):
    torch.manual_seed(3)
    logits, bias = torch.randn(256, 24) * 2, torch.randn(24) * 0.1
    logits[5] = 0.0  # ties everywhere
    rule = _rule(softmax=softmax, group_best=group_best)

    def route(x: torch.Tensor) -> ChosenExperts:
        return definition.route(x, None if softmax else bias, rule)

    alone = [route(row) for row in logits.split(1)]
    for count in range(1, 257):
        both = route(logits[:count])
        assert torch.equal(both.weights_NA, torch.cat([one.weights_NA for one in alone[:count]]))
        assert torch.equal(both.expert_ids_NA, torch.cat([one.expert_ids_NA for one in alone[:count]]))


def test_ties_go_to_the_lower_expert():
    routing = definition.route(torch.zeros(16, 8), torch.zeros(8), _rule(num_groups=1, num_groups_chosen=1))
    assert routing.expert_ids_NA.tolist() == [[0, 1, 2]] * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inner", "outer"), [(33, 57), (192, 176), (1000, 700)])
@pytest.mark.parametrize("group", [16, 64])
def test_products_of_a_row_do_not_depend_on_rows_or_place(dtype: torch.dtype, inner: int, outer: int, group: int):
    torch.manual_seed(inner)
    x, weight = torch.randn(256, inner).to(dtype), torch.randn(outer, inner).to(dtype).t()  # as loaded
    heads = torch.randn(3, 29, inner).to(dtype)[:, 9:].transpose(1, 2)
    x_heads = torch.randn(256, 3, inner).to(dtype)
    full = grouped_matmul(x, weight, group=group)
    full_heads = grouped_head_matmul(x_heads, heads, group=group)
    bias = torch.randn(outer).to(dtype)
    full_affine = grouped_affine(x, weight, bias, group=group)
    for count in range(group, 257, group):
        assert torch.equal(grouped_matmul(x[:count], weight, group=group), full[:count])
        assert torch.equal(grouped_head_matmul(x_heads[:count], heads, group=group), full_heads[:, :count])
        assert torch.equal(grouped_affine(x[:count], weight, bias, group=group), full_affine[:count])
    shifted = grouped_matmul(x.roll(5, 0), weight, group=group)
    assert torch.equal(shifted.roll(-5, 0), full)


@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(64, 80, 4), (64, 57, 8), (4, 64, 57), (64, 28, 64), (64, 64, 21)]
)
def test_batched_products_do_not_depend_on_the_batch(rows: int, inner: int, outer: int):
    """Shapes as attention has them: every factor's size is a multiple of 16 bytes."""
    torch.manual_seed(rows)
    left, right = torch.randn(256, rows, inner), torch.randn(256, inner, outer)
    transposed = torch.randn(256, outer, inner).transpose(1, 2)
    for factor in (right, transposed):
        full = torch.bmm(left, factor)
        for count in (*range(1, 20), 31, 64, 100, 255):
            assert torch.equal(torch.bmm(left[:count], factor[:count]), full[:count])
            assert torch.equal(torch.bmm(left[-count:], factor[-count:]), full[-count:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_a_row_do_not_depend_on_the_batch(dtype: torch.dtype):
    torch.manual_seed(2)
    x = torch.randn(256, 40).to(dtype)
    gate_up = [torch.randn(36, 40).to(dtype).t() for _ in range(6)]
    down = [torch.randn(40, 18).to(dtype).t() for _ in range(6)]
    routing = definition.route(torch.randn(256, 6), None, _rule(num_chosen=2, num_groups=1, num_groups_chosen=1))

    def experts(count: int, padded: int) -> torch.Tensor:
        part = ChosenExperts(routing.weights_NA[:count], routing.expert_ids_NA[:count])
        return expert_mlps(x[:padded], part, gate_up, down)

    full = experts(256, 256)
    for count in range(1, 257, 3):
        for group in (16, 64):
            assert torch.equal(experts(count, -(-count // group) * group), full[:count])
