"""Cached rows, bf16 or 8-bit, gathered as bf16: what a prefill step expands its keys and values from."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_contiguous
from kernels.lang import to_bf16
from kernels.latents.definition import GROUP, fp8_row_bytes
from kernels.latents.transfer import gather_rows
from kernels.table import KernelSource, KernelSources, lookup

_GROUP = tl.constexpr(GROUP)


@triton.jit(do_not_specialize=["num_rows"])
def dequantise_rows_kernel(
    out, codes, scales, halves, slots, num_rows, row_bytes, C: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr
):
    """Program (ROWS rows, group of latents; one more for the rotary part): 8-bit cached rows as bf16, exact.

    `codes`, `scales`, `halves` are one address; see `definition`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    group = tl.program_id(1)
    source = tl.load(slots + row, mask=row < num_rows, other=0) * row_bytes
    target = out + row * (C + R)
    if group * _GROUP < C:
        column = group * _GROUP + tl.arange(0, _GROUP)[None, :]
        inside = (row < num_rows) & (column < C)
        scale = tl.load(scales + (source + C) // 4 + group, mask=row < num_rows, other=1.0)
        value = tl.load(codes + source + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(target + column, to_bf16(value * scale), mask=inside)
    else:
        r = tl.arange(0, R)[None, :]
        rope = (source + C + (C + _GROUP - 1) // _GROUP * 4) // 2
        tl.store(target + C + r, tl.load(halves + rope + r, mask=row < num_rows, other=0.0), mask=row < num_rows)


def gather_latents(cache: Tensor, slots_T: Tensor, *, latent_rank: int, rope: int) -> Tensor:
    """The bf16 [latent | rotated key] rows of these slots, none of them -1: [T, C + R]. 8-bit rows are dequantised."""
    num_rows = slots_T.shape[0]
    width = latent_rank + rope
    latents_TL = torch.empty(num_rows, width, dtype=torch.bfloat16, device=cache.device)
    if cache.dtype == torch.bfloat16:
        require("cache", cache, (None, None, width), torch.bfloat16)
        gather_rows(cache.view(torch.uint8).flatten(0, 1), slots_T, latents_TL.view(torch.uint8))
        return latents_TL
    row_bytes = fp8_row_bytes(latent_rank, rope)
    require("cache", cache, (None, None, row_bytes), torch.uint8)
    require_contiguous("cache", cache)
    require("slots_T", slots_T, (num_rows,), torch.int64)
    config = lookup("dequantise_rows", f"latent={latent_rank},rope={rope}", cache.device)
    views = (cache.view(torch.float8_e4m3fn), cache.view(torch.float32), cache.view(torch.bfloat16))
    grid = (triton.cdiv(num_rows, config.constants["ROWS"]), triton.cdiv(latent_rank, GROUP) + 1)
    constants = {"C": latent_rank, "R": rope}
    dequantise_rows_kernel[grid](latents_TL, *views, slots_T, num_rows, row_bytes, **constants, **config.launch)
    return latents_TL


def _dequantise_source(fields: Mapping[str, str]) -> KernelSource:
    pointers = {"out": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "halves": "*bf16", "slots": "*i64"}
    wide = ["row_bytes"] if fields["latent"] == "512" else []
    constants = {"C": int(fields["latent"]), "R": int(fields["rope"])}
    signature = {**pointers, "num_rows": "i32", "row_bytes": "i32"}
    return KernelSource(dequantise_rows_kernel, signature, constants, (*pointers, *wide))


SOURCES: KernelSources = {"dequantise_rows": _dequantise_source}
