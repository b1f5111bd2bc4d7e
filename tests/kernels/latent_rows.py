"""Paged caches for kernel tests: every slot that must not be read holds NaN, unused table entries hold bogus ids."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.latents.definition import dequantise_latents, quantise_latents

BOGUS_BLOCK = 1 << 30


@dataclass(frozen=True)
class PagedRows:
    """Latents of several sequences as attention sees them, and where they lie."""

    cache: Tensor  # [blocks, block_size, L] bf16 or [blocks, block_size, bytes] uint8
    block_tables: Tensor  # [sequences, max_blocks] int32
    latents: list[Tensor]  # of each sequence, [length, L] fp32, as stored

    def slots(self, sequence: int, positions: Tensor) -> Tensor:
        """Cache slots (int64) of a sequence's positions."""
        size = self.cache.shape[1]
        return self.block_tables[sequence].long()[positions // size] * size + positions % size


def random_latents(lengths: list[int], width: int, *, seed: int = 0) -> list[Tensor]:
    """bf16 [length, width] for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator).to(torch.bfloat16) for length in lengths]


def paged(
    rows: list[Tensor], block_size: int, *, fp8_rank: int | None = None, seed: int = 0, spare_blocks: int = 3
) -> PagedRows:
    """Lays the sequences' rows into shuffled blocks. `fp8_rank`: as fp8 rows of that latent rank."""
    stored = rows if fp8_rank is None else [quantise_latents(r, fp8_rank) for r in rows]
    needed = [-(-len(r) // block_size) for r in rows]
    num_blocks = sum(needed) + spare_blocks
    ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    if fp8_rank is None:
        cache = torch.full((num_blocks, block_size, rows[0].shape[1]), torch.nan, dtype=torch.bfloat16)
    else:  # 0xff is a NaN in e4m3, in fp32 and in bf16
        cache = torch.full((num_blocks, block_size, stored[0].shape[1]), 0xFF, dtype=torch.uint8)
    tables = torch.full((len(rows), max(needed, default=0) + 2), BOGUS_BLOCK, dtype=torch.int32)
    for sequence, (values, count) in enumerate(zip(stored, needed, strict=True)):
        own, ids = ids[:count], ids[count:]
        tables[sequence, :count] = torch.tensor(own, dtype=torch.int32)
        for place, block in enumerate(own):
            part = values[place * block_size : (place + 1) * block_size]
            cache[block, : len(part)] = part
    seen = rows if fp8_rank is None else [dequantise_latents(r, fp8_rank) for r in stored]
    return PagedRows(cache, tables, [r.float() for r in seen])
