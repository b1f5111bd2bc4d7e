"""Matrices of a checkpoint as products take them: [in, out] views of what is stored as [out, in]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.products.definition import dequantise, grouped_affine, grouped_matmul


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [in, out]
    bias: Tensor | None = None  # [out]

    def forward(self, x_NK: Tensor, *, group: int) -> Tensor:
        """x @ weight + bias, `group` rows a product; N is a multiple of it."""
        if self.bias is None:
            return grouped_matmul(x_NK, self.weight, group=group)
        return grouped_affine(x_NK, self.weight, self.bias, group=group)


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """Kept in block-FP8, dequantised for each use: half the memory of bf16."""

    weight: Tensor  # [out, in] e4m3
    scales: Tensor  # [out, blocks of in] fp32: a row for each row, so that rows may be reordered and joined
    dtype: torch.dtype
    bias: Tensor | None = None

    def forward(self, x_NK: Tensor, *, group: int) -> Tensor:
        weight = dequantise(self.weight, self.scales, self.dtype)
        return Linear(weight.t(), self.bias).forward(x_NK, group=group)


class ExpertStack:
    """The experts' matrices, as `expert_mlps` takes them: [in, out] views of one stack."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight  # [E, out, in]
        self._matrices = tuple(matrix.t() for matrix in weight)

    def __getitem__(self, expert: int) -> Tensor:
        return self._matrices[expert]


@dataclass(frozen=True, slots=True)
class Fp8ExpertStack:
    """The same in block-FP8."""

    weight: Tensor  # [E, out, in] e4m3
    scales: Tensor  # [E, out, blocks of in] fp32
    dtype: torch.dtype

    def __getitem__(self, expert: int) -> Tensor:
        return dequantise(self.weight[expert], self.scales[expert], self.dtype).t()
