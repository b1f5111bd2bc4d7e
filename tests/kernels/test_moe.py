"""The experts against `definition.expert_mlps` in fp32 and, bit for bit, against themselves in other company."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from kernels.experts.definition import ChosenExperts, expert_mlps
from kernels.experts.grouping import group_pairs
from kernels.experts.mixture import Fp8Matrix, Role, experts
from kernels.products.definition import fp8_linear, quantise_rows

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROLES: tuple[Role, Role] = ("decode", "prefill")
# A gate far below zero: exp overflows, silu is zero.
pytestmark = [pytest.mark.parametrize("role", ROLES), pytest.mark.filterwarnings("ignore:overflow encountered in exp")]


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new buffer holds NaN, or a number that is no index."""
    plain = torch.Tensor.new_empty

    def poisoned(tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        out = plain(tensor, *args, **kwargs)
        return out.fill_(2**30 if out.dtype == torch.int32 else torch.nan if out.is_floating_point() else 0xFF)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def randn(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(DEVICE)


class Case(NamedTuple):
    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    def run(self, rows: torch.Tensor, role: Role, **options) -> torch.Tensor:
        return experts(self.x[rows], self.weights[rows], self.ids[rows], self.gate_up, self.down, role=role, **options)


def case(num_rows: int, num_experts: int, choices: int, hidden: int, width: int) -> Case:
    """Rows that lie in a wider buffer of NaN; expert 1 is chosen by no row."""
    wide = torch.full((num_rows, hidden + 16), torch.nan, dtype=BF16, device=DEVICE)
    wide[:, :hidden] = randn(num_rows, hidden, seed=0)
    scores = randn(num_rows, num_experts, seed=1)
    scores[:, 1] = -torch.inf
    weights, ids = scores.softmax(-1).topk(choices)
    gate_up = randn(num_experts, 2 * width, hidden, seed=2, scale=hidden**-0.5).to(BF16)
    down = randn(num_experts, hidden, width, seed=3, scale=width**-0.5).to(BF16)
    return Case(wide[:, :hidden], weights.contiguous(), ids.int().contiguous(), gate_up, down)


def oracle(c: Case) -> torch.Tensor:
    routing = ChosenExperts(c.weights, c.ids.long())
    return expert_mlps(c.x.float(), routing, c.gate_up.float().transpose(1, 2), c.down.float().transpose(1, 2))


def assert_near(out: torch.Tensor, expected: torch.Tensor, tolerance: float = 2**-8) -> None:
    """Two roundings to bf16 on the way; root mean square of a row's errors, relative to that of the row."""
    error = (out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < tolerance, error


SHAPES = [(1, 16, 2, 96, 48), (5, 4, 3, 64, 32), (19, 12, 2, 160, 80)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(role: Role, shape: tuple[int, int, int, int, int]) -> None:
    c = case(*shape)
    out = c.run(torch.arange(shape[0]), role)
    assert out.dtype == torch.float32
    assert_near(out, oracle(c))


def test_one_expert_takes_all_rows(role: Role) -> None:
    num_rows = 34 if role == "decode" else 130  # two tiles
    c = case(num_rows, 4, 1, 64, 32)
    c.ids.fill_(2)
    assert_near(c.run(torch.arange(num_rows), role), oracle(c))


def test_a_row_in_other_company_has_the_same_bits(role: Role) -> None:
    c = case(9, 4, 2, 160, 80)
    out = c.run(torch.arange(9), role)
    for rows in (torch.arange(8, -1, -1), torch.tensor([7, 3, 7]), torch.tensor([0])):
        assert torch.equal(c.run(rows, role), out[rows])


@pytest.mark.parametrize("real", [0, 4])
def test_padding_rows_are_not_looked_at(role: Role, real: int) -> None:
    c = case(6, 4, 2, 64, 32)
    expected = c.run(torch.arange(6), role)
    expected[real:] = 0
    c.x[real:], c.weights[real:], c.ids[real:] = torch.nan, torch.nan, 2**30
    num_real_rows = torch.tensor([real], dtype=torch.int32, device=DEVICE)
    assert torch.equal(c.run(torch.arange(6), role, num_real_rows=num_real_rows), expected)


def test_the_shared_expert_is_added_to_the_rounded_sum(role: Role) -> None:
    c = case(6, 4, 2, 96, 48)
    rows, shared = torch.arange(6), randn(6, 96, seed=4).to(BF16)
    routed = c.run(rows, role).to(BF16)
    num_real_rows = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    out = c.run(rows, role, shared_ND=shared, num_real_rows=num_real_rows)
    assert torch.equal(out[:4], (shared.float() + routed.float()).to(BF16)[:4])
    assert torch.equal(out[4:], shared[4:])
    assert torch.equal(c.run(rows, role, out_dtype=BF16), routed)


def quantised(matrix: torch.Tensor) -> Fp8Matrix:
    weight, scales = quantise_rows(matrix.flatten(0, 1))
    return Fp8Matrix(weight.unflatten(0, matrix.shape[:2]), scales.unflatten(0, matrix.shape[:2]))


def fp8_oracle(c: Case, gate_up: Fp8Matrix, down: Fp8Matrix) -> torch.Tensor:
    def product(x: torch.Tensor, matrix: Fp8Matrix, expert: int) -> torch.Tensor:
        return fp8_linear(*quantise_rows(x), matrix.weight[expert], matrix.scales[expert])

    def one(row: torch.Tensor, expert: int) -> torch.Tensor:
        gate, up = product(row, gate_up, expert).chunk(2, dim=-1)
        return product((gate.sigmoid() * gate * up).to(BF16), down, expert)[0]

    rows = zip(c.x.split(1), c.weights.tolist(), c.ids.tolist(), strict=True)
    return torch.stack([sum(w * one(x, e) for w, e in zip(ws, ids, strict=True)) for x, ws, ids in rows])


def test_block_fp8_experts(role: Role) -> None:
    plain = case(6, 4, 2, 208, 144)
    gate_up, down = quantised(plain.gate_up), quantised(plain.down)
    run = Case(*plain[:3], gate_up, down).run  # type: ignore[arg-type]
    out = run(torch.arange(6), role)
    assert_near(out, fp8_oracle(plain, gate_up, down), 2**-5)  # a hidden element may fall to the next e4m3 value
    rows = torch.tensor([3, 5, 0])
    assert torch.equal(run(rows, role), out[rows])


@pytest.mark.parametrize("real", [None, 0, 590])
def test_pairs_are_grouped_in_order(role: Role, real: int | None) -> None:
    """Two blocks of pairs; experts 1 and 2 are chosen by no row."""
    tile = 32 if role == "decode" else 128
    ids = torch.randint(3, 8, (600, 2), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    ids[::7] = 0
    real_rows = 600 if real is None else real
    expected = [(e, (ids[:real_rows].flatten() == e).nonzero().flatten().tolist()) for e in range(8)]
    ids[real_rows:] = 2**30
    on_device = None if real is None else torch.tensor([real], dtype=torch.int32, device=DEVICE)
    slots, tile_experts, num_tiles = group_pairs(ids, on_device, 8, tile, role=role)
    at = 0
    for expert, pairs in expected:
        num = -(-len(pairs) // tile)
        assert tile_experts[at : at + num].tolist() == [expert] * num
        assert slots[at * tile : (at + num) * tile].tolist() == pairs + [-1] * (num * tile - len(pairs))
        at += num
    assert num_tiles.item() == at


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c._replace(ids=c.ids.long()), "ids_NA is torch.int64"),
        (lambda c: c._replace(weights=c.weights[:, :1]), "ids_NA has shape"),
        (lambda c: c._replace(down=c.down[:, :, :16]), "gate_up has shape"),
        (lambda c: c._replace(x=c.x[:, :32]), "down has shape"),
        (lambda c: c._replace(gate_up=c.gate_up.mT.contiguous().mT), "gate_up has strides"),
        (lambda c: c._replace(gate_up=quantised(c.gate_up)), "must both be"),
    ],
)
def test_what_does_not_fit_is_refused(role: Role, change: Callable[[Case], Case], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        change(case(4, 8, 2, 64, 32)).run(torch.arange(4), role)
