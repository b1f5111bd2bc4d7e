"""The cached row in plain torch: its rotation, its store, and its 8-bit form.

An 8-bit row of C latent and R rotated elements is C e4m3 bytes, then one fp32 scale per GROUP latents, then R bf16: 656
bytes for 512 + 64. Scales are powers of two, so undoing one is exact: it moves the exponent of a value of four bits.
"""

import torch
from torch import Tensor

GROUP = 128  # latent elements that share a scale
LARGEST = 448.0  # of e4m3


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding of [..., R] whose halves are the pairs' first and second elements; fp32.

    `cos` repeats the angles for both halves; `signed_sin` is -sin, then +sin.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * signed_sin


def write_latents(cache_SL: Tensor, slots_B: Tensor, latent_BC: Tensor, k_pe_BR: Tensor) -> None:
    """Stores rows of [latent | rotated key] in the cache's dtype at their slots."""
    cache_SL.index_copy_(0, slots_B, torch.cat((latent_BC.to(cache_SL.dtype), k_pe_BR.to(cache_SL.dtype)), dim=-1))


def num_scales(latent_rank: int) -> int:
    """Scales of a row. Raises ValueError for a rank that is neither whole groups nor less than one."""
    if (latent_rank > GROUP and latent_rank % GROUP) or latent_rank % 16:
        raise ValueError(f"latent rank {latent_rank} is neither a multiple of {GROUP} nor a smaller one of 16")
    return max(1, latent_rank // GROUP)


def fp8_row_bytes(latent_rank: int, rope: int) -> int:
    """Bytes of a cached row."""
    return latent_rank + 4 * num_scales(latent_rank) + 2 * rope


def quantise_latents(rows_NL: Tensor, latent_rank: int) -> Tensor:
    """bf16 rows as uint8 [N, row bytes]. A scale is the group's largest magnitude / 448, rounded up to a power of two
    and at least 2**-126; 1 for a group of zeros."""
    latent = rows_NL[:, :latent_rank].float()
    rope = rows_NL[:, latent_rank:]
    groups = latent.unflatten(1, (num_scales(latent_rank), -1))
    mantissa, exponent = torch.frexp(groups.abs().amax(-1))  # 448 is 0.875 * 2**9
    exponent = torch.where(mantissa > LARGEST / 512, exponent - 8, exponent - 9).clamp_(min=-126)
    scales = torch.where(mantissa == 0, 1.0, torch.ldexp(torch.ones_like(mantissa), exponent))
    codes = (groups / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(1)
    parts = (codes.view(torch.uint8), scales.view(torch.uint8), rope.contiguous().view(torch.uint8))
    return torch.cat(parts, dim=1)


def dequantise_latents(rows_NX: Tensor, latent_rank: int) -> Tensor:
    """The same rows as bf16 [N, C + R], exact."""
    count = num_scales(latent_rank)
    codes, scales, rope = rows_NX.split((latent_rank, 4 * count, rows_NX.shape[1] - latent_rank - 4 * count), dim=1)
    groups = codes.contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (count, -1))
    latent = groups * scales.contiguous().view(torch.float32).unsqueeze(-1)
    return torch.cat((latent.flatten(1).to(torch.bfloat16), rope.contiguous().view(torch.bfloat16)), dim=1)
