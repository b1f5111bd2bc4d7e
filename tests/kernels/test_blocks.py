"""Rows of bytes out of the paged cache and back: the named ones, and no other byte."""

import pytest
import torch

from kernels.latents.transfer import gather_rows, scatter_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def some_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


@pytest.mark.parametrize("row_bytes", [1152, 656, 160, 100, 4])
@pytest.mark.parametrize("count", [1, 16, 37])
def test_out_and_back(row_bytes: int, count: int) -> None:
    cache = some_bytes(64, row_bytes)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:count].to(DEVICE)
    slots[count // 2] = -1
    kept = slots >= 0
    guarded = torch.full((count + 2, row_bytes), 0xA5, dtype=torch.uint8, device=DEVICE)
    start = 1 if row_bytes % 16 == 0 else 0
    out = guarded[start : start + count]
    gather_rows(cache, slots, out)
    assert torch.equal(out[kept], cache[slots[kept]])
    assert not out[~kept].any()
    assert (guarded[start + count :] == 0xA5).all()
    assert (guarded[:start] == 0xA5).all()

    fresh = some_bytes(64, row_bytes, seed=2)
    expected = fresh.clone()
    expected[slots[kept]] = cache[slots[kept]]
    scatter_rows(fresh, slots, out)
    assert torch.equal(fresh, expected)


def test_nothing_to_move() -> None:
    gather_rows(some_bytes(4, 32), torch.empty(0, dtype=torch.int64, device=DEVICE), some_bytes(0, 32))


def test_what_is_refused() -> None:
    slots = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="rows of 30 bytes, not a multiple of 4"):
        gather_rows(some_bytes(4, 30), slots, some_bytes(2, 30))
    with pytest.raises(ValueError, match=r"rows has shape \(3, 32\), not \(2, 32\)"):
        scatter_rows(some_bytes(4, 32), slots, some_bytes(3, 32))
    with pytest.raises(ValueError, match="not those of a contiguous"):
        gather_rows(some_bytes(4, 64)[:, :32], slots, some_bytes(2, 32))
