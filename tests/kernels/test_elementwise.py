"""Embedding, norms and SwiGLU against their definition; a row's bits are the same alone and in company."""

import pytest
import torch

from kernels.elementwise import definition
from kernels.elementwise.rows import add_rms_norm, embed, rms_norm, swiglu

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {"rtol": 2**-7, "atol": 1e-30}  # two roundings to bf16, each of which may go the other way


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(BF16).to(DEVICE)


def strided(x_ND: torch.Tensor) -> torch.Tensor:
    """The same rows in a wider buffer of NaN."""
    wide = torch.full((x_ND.shape[0], x_ND.shape[1] + 32), torch.nan, dtype=BF16, device=x_ND.device)
    wide[:, 16:-16] = x_ND
    return wide[:, 16:-16]


@pytest.mark.parametrize("width", [96, 192, 1536, 2048, 7168])
def test_rms_norm_is_the_definition_and_rows_do_not_see_each_other(width: int) -> None:
    x, weight = rows(5, width) * 3, rows(width, seed=1)
    x[2] = 0
    out = strided(torch.full_like(x, torch.nan))
    normed = rms_norm(strided(x), weight, 1e-6, out)
    assert normed is out
    torch.testing.assert_close(normed, definition.rms_norm(x, weight, eps=1e-6), **TOLERANCE)
    for row in range(5):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], normed[row])


@pytest.mark.parametrize("width", [192, 2048])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_add_rms_norm_rounds_the_sum_once(width: int, scale: float) -> None:
    x, delta, weight = rows(3, width), rows(3, width, seed=1), rows(width, seed=2)
    x_new, normed = add_rms_norm(strided(x), strided(delta), weight, 1e-5, scale)
    assert torch.equal(x_new, (x.float() + scale * delta.float()).to(BF16))
    assert torch.equal(normed, rms_norm(x_new, weight, 1e-5))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("width", [16, 192, 1408])
def test_swiglu(width: int) -> None:
    gate_up = rows(3, 2 * width) * 4
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0
    torch.testing.assert_close(swiglu(strided(gate_up)), definition.swiglu(gate_up), **TOLERANCE)


def test_embed_scales_and_answers_foreign_ids_with_zeros() -> None:
    table = rows(7, 192)
    ids = torch.tensor([3, 6, -1, 0, 7, 2**31 - 1], dtype=torch.int32, device=DEVICE)
    x = embed(table, ids, 0.3)
    assert torch.equal(x[[0, 1, 3]], (table[[3, 6, 0]].float() * torch.tensor(0.3)).to(BF16))
    assert not x[[2, 4, 5]].any()


def test_no_rows() -> None:
    empty = rows(0, 192)
    assert rms_norm(empty, rows(192), 1e-6).shape == swiglu(rows(0, 384)).shape == empty.shape
    assert embed(rows(4, 192), torch.empty(0, dtype=torch.int32, device=DEVICE), 1.0).shape == empty.shape


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x_ND is torch\.float32, not torch\.bfloat16"):
        rms_norm(rows(2, 64).float(), rows(64), 1e-6)
    with pytest.raises(ValueError, match=r"weight_D has shape \(32,\), not \(64,\)"):
        rms_norm(rows(2, 64), rows(32), 1e-6)
    with pytest.raises(ValueError, match="x_ND has rows of 8208 elements, more than 8192"):
        rms_norm(rows(1, 8208), rows(8208), 1e-6)
    with pytest.raises(ValueError, match="is no multiple of 16 bytes"):
        swiglu(rows(2, 72)[:, 4:68])
