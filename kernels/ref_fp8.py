"""Block-FP8 products in plain torch: what `gemm_fp8` computes, block by block, in fp32."""

import torch
from torch import Tensor

from kernels.ref import FP8_BLOCK

E4M3_MAX = 448.0


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
