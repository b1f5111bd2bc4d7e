"""The grid of paged MLA decode: shapes, the bytes and FLOPs that bound them, shuffled data, the fp32 reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kernels.latents.definition import dequantise_latents, fp8_row_bytes, quantise_latents

LATENT = 512
ROPE = 64
BLOCK = 64
ROW = LATENT + ROPE
FP8_ROW_BYTES = fp8_row_bytes(LATENT, ROPE)
SCALE = 192**-0.5  # 1 / sqrt(nope + rope)
Rows = Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Cell:
    """`batch` sequences of `context` positions (varied: of that mean), `q_len` queries at the end of each."""

    heads: int
    batch: int
    context: int
    q_len: int = 1
    is_varied: bool = False
    rows: Rows = "bf16"

    @property
    def name(self) -> str:
        extra = [f"q_len {self.q_len}"] * (self.q_len > 1) + ["varlen"] * self.is_varied
        extra += ["fp8 rows"] * (self.rows == "fp8")
        return " ".join((f"{self.heads} x {self.batch} x {shown_length(self.context)}", *extra))

    @property
    def is_compared(self) -> bool:
        """With the variant that is not exact, which is compiled for each length of splits."""
        is_plain = self.q_len == 1 and self.rows == "bf16" and not self.is_varied
        return is_plain and self.batch in (1, 32, 128) and self.context in (4 << 10, 64 << 10)

    @cached_property
    def lengths(self) -> list[int]:
        """Positions of each sequence."""
        if not self.is_varied:
            return [self.context] * self.batch
        normal = torch.randn(self.batch, generator=torch.Generator().manual_seed(0)) * self.context / 2 + self.context
        return normal.clamp(self.q_len, 2 * self.context).int().tolist()

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def blocks_per_row(self) -> int:
        return -(-self.longest // BLOCK)

    @property
    def row_bytes(self) -> int:
        return 2 * ROW if self.rows == "bf16" else FP8_ROW_BYTES

    @property
    def num_bytes(self) -> int:
        """Cached rows once for each sequence, queries, outputs."""
        return sum(self.lengths) * self.row_bytes + self.batch * self.q_len * self.heads * (ROW + LATENT) * 2

    @property
    def flops(self) -> int:
        """Scores and weighted sum: 2 * (576 + 512) for each head and key."""
        keys = sum(length - after for length in self.lengths for after in range(self.q_len))
        return 2 * (ROW + LATENT) * self.heads * keys


def shown_length(context: int) -> str:
    return f"{context >> 10}k" if context % 1024 == 0 else str(context)


class Cache:
    """One cache of random latents that all cells share, each with block tables of its own; fp8 rows are optional."""

    def __init__(self, num_blocks: int, device: torch.device, num_fp8_blocks: int = 0) -> None:
        self.bf16 = torch.empty(num_blocks, BLOCK, ROW, dtype=torch.bfloat16, device=device)
        self.fp8 = torch.empty(num_fp8_blocks, BLOCK, FP8_ROW_BYTES, dtype=torch.uint8, device=device)
        for part in self.bf16.split(4096):
            part.normal_()
        for packed, part in zip(self.fp8.split(4096), self.bf16[:num_fp8_blocks].split(4096), strict=False):
            packed.copy_(quantise_latents(part.flatten(0, 1), LATENT).view_as(packed))

    def of(self, cell: Cell) -> Tensor:
        return self.bf16 if cell.rows == "bf16" else self.fp8

    def holds(self, cell: Cell) -> bool:
        return cell.batch * cell.blocks_per_row <= self.of(cell).shape[0]

    def rotations(self, cell: Cell, wanted: int) -> int:
        """As many as have blocks of their own."""
        return max(1, min(wanted, self.of(cell).shape[0] // (cell.batch * cell.blocks_per_row)))


def unpack_rows(rows_SX: Tensor) -> Tensor:
    """Cached rows of either form in fp32, [S, 576]."""
    return (rows_SX if rows_SX.dtype == torch.bfloat16 else dequantise_latents(rows_SX, LATENT)).float()


class Inputs(NamedTuple):
    """Of one cell; a rotation is one index of queries and tables."""

    cache: Tensor
    q_RNHL: Tensor
    tables_RBM: Tensor  # [rotations, batch, blocks]
    tables_RNM: Tensor  # the same for each query row
    positions_N: Tensor
    lengths_B: Tensor
    scale_N: Tensor

    @property
    def rotations(self) -> int:
        return self.q_RNHL.shape[0]


def make_inputs(cell: Cell, cache: Cache, rotations: int) -> Inputs:
    """Blocks are shuffled over the whole cache, and no two rotations share one."""
    memory = cache.of(cell)
    device = memory.device
    N = cell.batch * cell.q_len
    order = torch.randperm(memory.shape[0], device=device)[: rotations * cell.batch * cell.blocks_per_row]
    tables = order.int().view(rotations, cell.batch, cell.blocks_per_row)
    lengths = torch.tensor(cell.lengths, dtype=torch.int32, device=device)
    before_end = torch.arange(cell.q_len, 0, -1, dtype=torch.int32, device=device)
    return Inputs(
        cache=memory,
        q_RNHL=torch.randn(rotations, N, cell.heads, ROW, dtype=torch.bfloat16, device=device),
        tables_RBM=tables,
        tables_RNM=tables.repeat_interleave(cell.q_len, dim=1),
        positions_N=(lengths[:, None] - before_end).flatten(),
        lengths_B=lengths,
        scale_N=torch.full((N,), SCALE, device=device),
    )


class Error(NamedTuple):
    """Of an output against fp32."""

    largest: float
    cosine: float  # 1 - 2 <x, y> / (<x, x> + <y, y>)


def error_of(out_NHC: Tensor, inputs: Inputs, rotation: int, most: int = 4) -> Error:
    """Of at most so many rows, spread over the step."""
    N = out_NHC.shape[0]
    rows = sorted({row * (N - 1) // max(1, most - 1) for row in range(most)})
    expected = torch.stack(list(reference(inputs, rotation, rows))).double()
    seen = out_NHC[rows].double()
    if not seen.isfinite().all():
        return Error(float("inf"), float("inf"))
    cosine = 1 - 2 * (seen * expected).sum() / (seen.square().sum() + expected.square().sum())
    return Error((seen - expected).abs().max().item(), cosine.item())


def reference(inputs: Inputs, rotation: int, rows: list[int]) -> Iterator[Tensor]:
    """[H, C] in fp32 of each row."""
    for row in rows:
        num_keys = int(inputs.positions_N[row]) + 1
        blocks = inputs.tables_RNM[rotation, row, : -(-num_keys // BLOCK)].long()
        keys = unpack_rows(inputs.cache[blocks].flatten(0, 1)[:num_keys])
        scores = inputs.q_RNHL[rotation, row].float() @ keys.T * SCALE
        yield scores.softmax(-1) @ keys[:, :LATENT]
