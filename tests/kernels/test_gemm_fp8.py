"""Block-FP8 products against their definition, and the quantisation of rows, which has its very bits."""

import pytest
import torch
from torch import Tensor

from kernels.products import definition
from kernels.products.bf16 import Role
from kernels.products.fp8 import fp8_linear, quantise_rows
from kernels.table import Config, UnsupportedKernel

E4M3 = torch.float8_e4m3fn
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Config({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 32, "GROUP": 2}, num_warps=4, num_stages=2)
# One rounding to bf16. Hopper's tensor cores add e4m3 products with some 13 bits, within a block of 128.
TO_BF16 = {"rtol": 2**-8, "atol": 1e-2 if DEVICE.type == "cuda" else 1e-4}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(DEVICE)


def inside(x: Tensor) -> Tensor:
    """The same rows amid NaN: more rows after them, 16 elements before and after each."""
    poison = 0x7F if x.dtype == E4M3 else 0xFF
    size = x.element_size()
    around = torch.full((x.shape[0] + 40, (x.shape[1] + 32) * size), poison, dtype=torch.uint8, device=x.device)
    around.view(x.dtype)[: x.shape[0], 16:-16].copy_(x)
    return around.view(x.dtype)[: x.shape[0], 16:-16]


def matrix(M: int, K: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """e4m3 with scales of very different size from row to row and block to block."""
    weight, scales = definition.quantise_rows(normal(M, K, seed=seed))
    return weight, scales * normal(*scales.shape, seed=seed + 1).float().exp()


@pytest.mark.parametrize("K", [96, 128, 272, 1168])
def test_rows_are_quantised_as_defined_bit_for_bit(K: int) -> None:
    x = normal(7, K) * normal(7, 1, seed=1).exp()
    x[2, :96] = 0
    x[3] *= 1e-30
    x[4] *= 1e30
    x[5, 0] = 448 * 64
    quantised, scales = quantise_rows(inside(x))
    expected, expected_scales = definition.quantise_rows(x)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(quantised.view(torch.uint8), expected.view(torch.uint8))


def test_quantised_rows_are_near_the_rows() -> None:
    x = normal(5, 272)
    x[1] = 0
    quantised, scales = quantise_rows(x)
    assert (scales[1] == 1).all()
    back = quantised.float() * scales.repeat_interleave(128, 1)[:, :272]
    torch.testing.assert_close(back, x.float(), rtol=2**-4, atol=4.0 / 448 * 2**-6)


def test_a_nan_stays_in_its_row() -> None:
    x = normal(3, 96)
    x[1, 7] = torch.nan
    weight, weight_scales = matrix(48, 96)
    out = fp8_linear(*quantise_rows(x), weight, weight_scales, role="decode")
    assert out[[0, 2]].isfinite().all()
    if DEVICE.type == "cuda":  # the interpreter reads e4m3's NaN as 480
        assert out[1].isnan().all()


@pytest.mark.parametrize("role", ["decode", "prefill"])
@pytest.mark.parametrize(("N", "K", "M"), [(1, 96, 48), (33, 272, 160), (17, 128, 16)])
def test_products(role: Role, N: int, K: int, M: int) -> None:
    x, x_scales = quantise_rows(normal(N, K))
    weight, weight_scales = matrix(M, K)
    out = fp8_linear(inside(x), x_scales, inside(weight), weight_scales, role=role)
    torch.testing.assert_close(out.float(), definition.fp8_linear(x, x_scales, weight, weight_scales), **TO_BF16)


@pytest.mark.parametrize(("role", "config"), [("decode", None), ("prefill", None), ("decode", SMALL)])
def test_a_row_does_not_see_the_others(role: Role, config: Config | None) -> None:
    x, x_scales = quantise_rows(normal(33, 272))
    weight, weight_scales = matrix(112, 272)

    def product(rows: Tensor, scales: Tensor) -> Tensor:
        return fp8_linear(rows, scales, weight, weight_scales, role=role, config=config)

    together = product(x, x_scales)
    for row in (0, 15, 16, 32):
        assert torch.equal(product(x[row : row + 1], x_scales[row : row + 1])[0], together[row])
    moved = product(
        x.view(torch.uint8).flip(0).view(E4M3), torch.cat((x_scales[20:].flip(0) * torch.nan, x_scales[:20].flip(0)))
    )
    assert torch.equal(moved[13:].flip(0), together[:20])


def test_bias_is_added_before_the_only_rounding() -> None:
    x, x_scales = quantise_rows(normal(3, 96))
    weight, weight_scales = matrix(48, 96)
    bias = normal(48, seed=5) * 64
    operands = (x, x_scales, weight, weight_scales)
    exact = fp8_linear(*operands, bias, role="decode", out_dtype=torch.float32, config=SMALL)
    torch.testing.assert_close(exact, definition.fp8_linear(*operands) + bias.float(), rtol=1e-3, atol=1e-2)
    assert torch.equal(fp8_linear(*operands, bias, role="decode", config=SMALL), exact.to(torch.bfloat16))


def test_refusals() -> None:
    x, x_scales = quantise_rows(normal(2, 272))
    weight, weight_scales = matrix(48, 272)
    for arguments, named in [
        ((x.float(), x_scales, weight, weight_scales), "x_NK is torch.float32"),
        ((x, x_scales, weight.view(torch.uint8), weight_scales), "weight_MK is torch.uint8"),
        ((x, x_scales[:, :2], weight, weight_scales), "x_scales_NB has shape"),
        ((x, x_scales, weight, weight_scales[:32]), "weight_scales_MB has shape"),
        ((x, x_scales, weight, weight_scales.t().contiguous().t()), "weight_scales_MB has strides"),
        ((x, x_scales, weight[:40], weight_scales[:40]), "out_NM has rows of 40 elements"),
        ((x[:, :40], x_scales[:, :1], weight[:, :40], weight_scales[:, :1]), "x_NK has rows of 40 elements"),
        ((x, x_scales, weight, weight_scales, normal(32)), "bias_M has shape"),
    ]:
        with pytest.raises(ValueError, match=named):
            fp8_linear(*arguments, role="decode")
    with pytest.raises(ValueError, match=r"x_NK is torch.float32"):
        quantise_rows(normal(2, 96).float())
    with pytest.raises(UnsupportedKernel, match=r"fp8_linear.*out=fp32"):
        fp8_linear(x, x_scales, weight, weight_scales, role="decode", out_dtype=torch.float32)
