"""Products in plain torch, `group` rows at a time, and block-FP8 products block by block in fp32.

Shapes: N rows of a step, a multiple of `group`; K inputs; M outputs; H heads; B = ceil(K / FP8_BLOCK) blocks.
"""

import torch
from torch import Tensor

FP8_BLOCK = 128  # rows and columns that share a scale in FP8 checkpoints
E4M3_MAX = 448.0


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


def grouped_head_matmul(x_NHK: Tensor, weight_HKM: Tensor, *, group: int) -> Tensor:
    """Each head's rows times that head's weight, `group` rows at a time. Returns [H, N, M]."""
    x_HNK = x_NHK.transpose(0, 1)
    if x_NHK.shape[0] == group:
        return torch.bmm(x_HNK, weight_HKM)
    return torch.cat([torch.bmm(rows, weight_HKM) for rows in x_HNK.split(group, dim=1)], dim=1)


def dequantise(fp8_MK: Tensor, scales_MB: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a block-FP8 matrix: every run of FP8_BLOCK elements of a row has its scale, the last run may be short."""
    scales_MK = scales_MB.float().repeat_interleave(FP8_BLOCK, dim=-1).narrow(-1, 0, fp8_MK.shape[-1])
    return scales_MK.mul_(fp8_MK.float()).to(dtype)


def quantise_rows(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K] and fp32 scales [N, ceil(K / FP8_BLOCK)]; a row's value is about e4m3 * scale of its block.

    A block's scale is its greatest magnitude / 448, not rounded to a power of two; 1 where the block is all zeros.
    """
    x = x_NK.float()
    pad = -x.shape[1] % FP8_BLOCK
    blocks = torch.nn.functional.pad(x, (0, pad)).unflatten(1, (-1, FP8_BLOCK))
    peak = blocks.abs().amax(-1)
    scales = torch.where(peak == 0.0, 1.0, peak / E4M3_MAX)
    scaled = (blocks / scales.unsqueeze(-1)).flatten(1).narrow(1, 0, x.shape[1])
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def fp8_linear(x_NK: Tensor, x_scales_NB: Tensor, weight_MK: Tensor, weight_scales_MB: Tensor) -> Tensor:
    """fp32 [N, M]: for each block of K in order, the product of e4m3 values times both scales, added up."""
    total = torch.zeros(x_NK.shape[0], weight_MK.shape[0], device=x_NK.device)
    scales = zip(x_scales_NB.unbind(1), weight_scales_MB.unbind(1), strict=True)
    blocks = zip(x_NK.split(FP8_BLOCK, dim=1), weight_MK.split(FP8_BLOCK, dim=1), scales, strict=True)
    for x, weight, (x_scale, weight_scale) in blocks:
        total += (x.float() @ weight.float().t()) * x_scale[:, None] * weight_scale[None, :]
    return total
