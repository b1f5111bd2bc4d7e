"""Products at V2-Lite's shapes against cuBLAS: bf16, block-FP8, and the grouped products of experts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_timing import Call, Ceilings, Report, Timer
from benchmarks.inexact import ROW_TILES, with_row_tile
from kernels.elementwise.definition import swiglu
from kernels.experts import mixture as expert_kernels
from kernels.experts.mixture import Fp8Matrix
from kernels.products import bf16
from kernels.products import fp8 as block_fp8
from kernels.products.bf16 import Role, head_matmul
from kernels.products.definition import dequantise
from kernels.products.fp8 import quantise_rows


class Shape(NamedTuple):
    name: str
    inputs: int
    outputs: int
    in_prefill: bool = True


SHAPES = (
    Shape("query and latent", 2048, 3648),
    Shape("attention out", 2048, 2048),
    Shape("dense gate, up", 2048, 21888),
    Shape("dense down", 10944, 2048),
    Shape("shared gate, up", 2048, 5632),
    Shape("shared down", 2816, 2048),
    Shape("head", 2048, 102400, in_prefill=False),
)
DRY_SHAPES = (Shape("dry", 64, 48),)
DECODE_ROWS = (1, 32, 128)
PREFILL_ROWS = 4096
HIDDEN = 2048
WIDTH = 1408
EXPERTS = 64
CHOSEN = 6


class Bound(NamedTuple):
    """What a product cannot be faster than."""

    num_bytes: int
    flops: int

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.num_bytes / ceilings.read_bytes_per_s, self.flops / ceilings.matmul_flops)


def role_of(rows: int) -> Role:
    return "prefill" if rows == PREFILL_ROWS else "decode"


def rows_of(shape: Shape, timer: Timer) -> tuple[int, ...]:
    if timer.is_dry:
        return (3,)
    return (*DECODE_ROWS, PREFILL_ROWS) if shape.in_prefill else DECODE_ROWS


def normal(timer: Timer, *shape: int, std: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=timer.device).normal_(std=std)


def relative_error(out: Tensor, expected: Tensor) -> str:
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    return f"{difference.item():.1e}"


def by_row_tile(call: Call, timer: Timer, rotations: int) -> dict[str, float]:
    """Medians of the exact choice and of every row tile; a tile that this kernel cannot have is left out."""
    calls: dict[str, Callable[[], object]] = timer.graphs({"exact": call}, rotations)
    for tile in ROW_TILES[: 1 if timer.is_dry else None]:
        with with_row_tile(tile):
            calls |= timer.graphs({f"{tile} rows": call}, rotations, failures=[])
    return {name: sample.median / rotations for name, sample in timer.replay(calls).items()}


def linear(shape: Shape, rows: int, ceilings: Ceilings, timer: Timer) -> list[str]:
    bound = Bound(
        2 * (shape.inputs * shape.outputs + rows * (shape.inputs + shape.outputs)),
        2 * rows * shape.inputs * shape.outputs,
    )
    rotations = timer.rotations(bound.num_bytes)
    x = normal(timer, rotations, rows, shape.inputs)
    weight = normal(timer, rotations, shape.outputs, shape.inputs, std=shape.inputs**-0.5)
    role = role_of(rows)

    def ours(rotation: int) -> Tensor:
        return bf16.linear(x[rotation], weight[rotation], role=role)

    error = relative_error(ours(0), x[0].float() @ weight[0].float().T)
    tiles = by_row_tile(ours, timer, rotations) if role == "decode" else {}
    pair = timer.compare({"ours": ours, "cuBLAS": lambda i: torch.mm(x[i], weight[i].T)}, rotations)
    mine, theirs = (pair[name].median if name in pair else float("nan") for name in ("ours", "cuBLAS"))
    cost = tiles["exact"] / min(tiles.values()) - 1 if "exact" in tiles else float("nan")
    shown_cost = f"{cost:+.1%}" if role == "decode" else ""
    return [*figures(shape, rows, bound, mine, ceilings), f"{theirs / mine:.2f}", shown_cost, error]


def figures(shape: Shape, rows: int, bound: Bound, seconds: float, ceilings: Ceilings) -> list[str]:
    """The cells of a shape's row: name, rows, microseconds, GB/s, TFLOP/s and the share of the bound."""
    gigabytes = bound.num_bytes / seconds / 1e9
    teraflops = bound.flops / seconds / 1e12
    share = bound.seconds(ceilings) / seconds
    return [
        shape.name,
        f"{rows}",
        f"{seconds * 1e6:.1f}",
        f"{gigabytes:,.0f}",
        f"{teraflops:.0f}",
        f"{share:.0%}",
    ]


def per_head(inputs: int, outputs: int, rows: int, ceilings: Ceilings, timer: Timer) -> list[str]:
    """The two products that absorb the latent's expansion, over 16 heads, from the layouts they have in kv_b."""
    heads = 2 if timer.is_dry else 16
    size = heads * (inputs * outputs + rows * (inputs + outputs))
    bound = Bound(2 * size, 2 * rows * heads * inputs * outputs)
    rotations = timer.rotations(bound.num_bytes)
    x = normal(timer, rotations, rows, heads, inputs)
    out = normal(timer, rows, heads, outputs)
    kv_b = normal(timer, rotations, heads, 256, 512, std=512**-0.5)
    weight = kv_b[:, :, :128] if inputs == 128 else kv_b[:, :, 128:].transpose(2, 3)

    def ours(rotation: int) -> Tensor:
        head_matmul(x[rotation], weight[rotation], out, role="decode")
        return out

    expected = torch.einsum("nhk,hkm->nhm", x[0].float(), weight[0].float())
    error = relative_error(ours(0), expected)
    tiles = by_row_tile(ours, timer, rotations)
    pair = timer.compare({"ours": ours, "cuBLAS": lambda i: torch.bmm(x[i].transpose(0, 1), weight[i])}, rotations)
    mine, theirs = (pair[name].median if name in pair else float("nan") for name in ("ours", "cuBLAS"))
    cost = tiles["exact"] / min(tiles.values()) - 1 if "exact" in tiles else float("nan")
    shape = Shape("key up" if inputs == 128 else "value up", inputs, outputs)
    return [*figures(shape, rows, bound, mine, ceilings), f"{theirs / mine:.2f}", f"{cost:+.1%}", error]


def made(makes: Sequence[partial[list[str]]], timer: Timer) -> list[list[str]]:
    """The rows of a table, without those that fail or for which no time is left."""
    rows = [timer.attempt(f"{make.func.__name__} {make.args[:2]}", make) for make in makes if timer.has_time]
    return [row for row in rows if row is not None]


COLUMNS = ("product", "rows", "us", "GB/s", "TFLOP/s", "of floor")


def bf16_table(ceilings: Ceilings, report: Report, timer: Timer) -> None:
    shapes = DRY_SHAPES if timer.is_dry else SHAPES
    makes = [partial(linear, shape, n, ceilings, timer) for shape in shapes for n in rows_of(shape, timer)]
    sizes = ((128, 512), (512, 128))
    counts = (3,) if timer.is_dry else DECODE_ROWS
    makes += [partial(per_head, *size, count, ceilings, timer) for size in sizes for count in counts]
    note = "bf16 products, weights cold. Exactness costs the table's choice over our best tile of rows for this size."
    report.table((*COLUMNS, "x cuBLAS", "exactness costs", "relative error"), made(makes, timer), note)


def fp8_linear(shape: Shape, rows: int, ceilings: Ceilings, timer: Timer) -> list[str]:
    """Against cuBLAS's FP8 product with one scale a row and a column, which has less to do."""
    bound = Bound(
        shape.inputs * shape.outputs + rows * (shape.inputs + 2 * shape.outputs),
        2 * rows * shape.inputs * shape.outputs,
    )
    rotations = timer.rotations(bound.num_bytes)
    x = normal(timer, rotations, rows, shape.inputs)
    quantised = [quantise_rows(one) for one in x]
    weights = [quantise_rows(normal(timer, shape.outputs, shape.inputs)) for _ in range(rotations)]
    role = role_of(rows)

    def ours(rotation: int) -> Tensor:
        return block_fp8.fp8_linear(*quantised[rotation], *weights[rotation], role=role)

    ones = torch.ones(max(rows, shape.outputs), device=timer.device)
    scales = {"scale_a": ones[:rows, None], "scale_b": ones[None, : shape.outputs], "out_dtype": torch.bfloat16}

    def theirs(rotation: int) -> Tensor:
        return torch._scaled_mm(quantised[rotation][0], weights[rotation][0].T, **scales)  # noqa: SLF001 — no public name

    wide = [dequantise(values, scale, torch.float32) for values, scale in (quantised[0], weights[0])]
    error = relative_error(ours(0), wide[0] @ wide[1].T)
    calls: dict[str, Call] = {"ours": ours, "with quantising": lambda i: (quantise_rows(x[i]), ours(i))}
    pair = timer.compare(calls if timer.is_dry else {**calls, "cuBLAS fp8": theirs}, rotations)
    mine = pair["ours"].median if "ours" in pair else float("nan")
    both = pair["with quantising"].median if "with quantising" in pair else float("nan")
    peer = pair["cuBLAS fp8"].median if "cuBLAS fp8" in pair else float("nan")
    fast = ceilings._replace(matmul_flops=2 * ceilings.matmul_flops)
    return [*figures(shape, rows, bound, mine, fast), f"{both * 1e6:.1f}", f"{peer / mine:.2f}", error]


def fp8_table(ceilings: Ceilings, report: Report, timer: Timer) -> None:
    shapes = DRY_SHAPES if timer.is_dry else SHAPES[:-1]
    makes = [partial(fp8_linear, shape, n, ceilings, timer) for shape in shapes for n in rows_of(shape, timer)]
    note = (
        "Block-FP8 products. The floor takes twice the bf16 matmul ceiling; cuBLAS here scales rows and columns only."
    )
    report.table((*COLUMNS, "us with quantising", "x cuBLAS fp8", "relative error"), made(makes, timer), note)


class ExpertLoad(NamedTuple):
    hidden: int = HIDDEN
    width: int = WIDTH
    experts: int = EXPERTS
    chosen: int = CHOSEN


def mixture(rows: int, load: ExpertLoad, ceilings: Ceilings, timer: Timer, *, fp8: bool) -> list[str]:
    """Distinct experts are counted from the ids, which are uniform."""
    D = load.hidden
    W = load.width
    E = load.experts
    gate_up: Any = normal(timer, E, 2 * W, D, std=D**-0.5)
    down: Any = normal(timer, E, D, W, std=W**-0.5)
    if fp8:
        gate_up, down = (as_fp8(matrices) for matrices in (gate_up, down))
    count = 2 if timer.is_dry else 4 if rows < PREFILL_ROWS else 2
    x = normal(timer, count, rows, D)
    ids = torch.rand(count, rows, E, device=timer.device).argsort(-1)[..., : load.chosen].int().contiguous()
    weights = torch.rand(count, rows, load.chosen, device=timer.device)
    role = role_of(rows)

    def ours(rotation: int) -> Tensor:
        return expert_kernels.experts(x[rotation], weights[rotation], ids[rotation], gate_up, down, None, role=role)

    taken = timer.compare({"experts": ours}, count)
    seconds = taken["experts"].median if taken else float("nan")
    hit = sum(one.unique().numel() for one in ids) / count
    size = 1 if fp8 else 2
    bound = Bound(int(hit * 3 * D * W * size + rows * D * 6), 2 * rows * load.chosen * 3 * D * W)
    name = "fp8 experts" if fp8 else "bf16 experts"
    fast = ceilings._replace(matmul_flops=2 * ceilings.matmul_flops) if fp8 else ceilings
    shown = figures(Shape(name, D, W), rows, bound, seconds, fast)
    error = relative_error(ours(0)[0], one_row(x[0, 0], weights[0, 0], ids[0, 0], gate_up, down))
    return [*shown, f"{hit:.0f} of {E}", error]


def one_row(x_D: Tensor, weights_A: Tensor, ids_A: Tensor, gate_up: Any, down: Any) -> Tensor:
    """What its experts give, in fp32."""

    def matrix(stack: Any, expert: int) -> Tensor:
        if isinstance(stack, Tensor):
            return stack[expert].float()
        return dequantise(stack.weight[expert], stack.scales[expert], torch.float32)

    experts = ids_A.tolist()
    outputs = [matrix(down, expert) @ swiglu(matrix(gate_up, expert) @ x_D.float()) for expert in experts]
    return weights_A @ torch.stack(outputs)


def as_fp8(matrices_EMK: Tensor) -> Any:
    quantised = [quantise_rows(matrix) for matrix in matrices_EMK]
    return Fp8Matrix(*(torch.stack(parts) for parts in zip(*quantised, strict=True)))


def tables(ceilings: Ceilings, report: Report, timer: Timer) -> None:
    bf16_table(ceilings, report, timer)
    fp8_table(ceilings, report, timer)


def experts_table(ceilings: Ceilings, report: Report, timer: Timer) -> None:
    load = ExpertLoad()
    counts = (*DECODE_ROWS, PREFILL_ROWS)
    if timer.is_dry:
        load = ExpertLoad(64, 32, 4, 2)
        counts = (3,)
    makes = [partial(mixture, n, load, ceilings, timer, fp8=fp8) for fp8 in (False, True) for n in counts]
    note = "Experts (both products, gate and sum), uniform routing. Bytes are those of the experts touched."
    report.table((*COLUMNS, "experts touched", "relative error"), made(makes, timer), note)
