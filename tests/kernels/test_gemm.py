"""Row-exact products against fp32; a row's bits are the same alone, in company and at another place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.products.bf16 import Role, head_matmul, linear, router_logits, width
from kernels.table import Config, UnsupportedKernel

BF16 = torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATOL = 2e-5 if DEVICE.type == "cpu" else 5e-5  # tensor cores truncate as they add
TO_BF16 = {"rtol": 2**-8, "atol": 1e-3}  # one rounding; fp32 sums near zero differ by their order
SMALL = Config({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 32, "BLOCK_K": 64, "GROUP": 2}, num_warps=4, num_stages=2)


@pytest.fixture(autouse=True)
def outputs_begin_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape, torch.nan, **options))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def inside(x: Tensor) -> Tensor:
    """The same rows amid NaN: more rows after them, 16 elements before and after each."""
    around = torch.full((x.shape[0] + 40, x.shape[1] + 32), torch.nan, dtype=x.dtype, device=x.device)
    around[: x.shape[0], 16:-16] = x
    return around[: x.shape[0], 16:-16]


@pytest.mark.parametrize("role", ["decode", "prefill"])
@pytest.mark.parametrize(("N", "K", "M"), [(1, 96, 48), (33, 272, 160), (17, 16, 16)])
def test_linear(role: Role, N: int, K: int, M: int) -> None:
    x, weight = normal(N, K), normal(M, K, seed=1)
    out = linear(inside(x), inside(weight), role=role)
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), x.float() @ weight.float().t(), **TO_BF16)


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_bias_is_added_before_the_only_rounding(role: Role) -> None:
    x, weight, bias = normal(3, 96), normal(48, 96, seed=1), inside(normal(1, 48, seed=2))[0]
    bias = bias * 64
    out = linear(x, weight, bias, role=role)
    torch.testing.assert_close(out.float(), x.float() @ weight.float().t() + bias.float(), **TO_BF16)
    exact = linear(x, weight, bias, role=role, out_dtype=torch.float32, config=SMALL)
    assert torch.equal(linear(x, weight, bias, role=role, config=SMALL), exact.to(BF16))


def test_linear_in_fp32() -> None:
    x, weight = normal(5, 272), normal(160, 272, seed=1)
    out = linear(x, weight, role="decode", out_dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x.float() @ weight.float().t(), rtol=1e-5, atol=1e-4)


def _linear(role: Role, config: Config | None = None) -> Callable[[Tensor], Tensor]:
    weight, bias = normal(112, 208, seed=1), normal(112, seed=2)
    return lambda x: linear(x, weight, bias, role=role, config=config)


def _heads(x: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], 2, 48)
    head_matmul(x[:, :192].unflatten(1, (2, 96)), normal(2, 96, 48, seed=1), out, role="decode", config=SMALL)
    return out


def _logits(x: Tensor) -> Tensor:
    return router_logits(x, normal(32, 208, seed=1, dtype=torch.float32), "decode")


@pytest.mark.parametrize(
    "product",
    [_linear("decode"), _linear("prefill"), _linear("decode", SMALL), _linear("prefill", SMALL), _heads, _logits],
    ids=["decode", "prefill", "decode-small", "prefill-small", "heads", "router"],
)
def test_a_row_does_not_see_the_others(product: Callable[[Tensor], Tensor]) -> None:
    x = normal(33, 208)
    together = product(x)
    for row in (0, 15, 16, 32):
        assert torch.equal(product(x[row : row + 1])[0], together[row])
    company = x.clone()
    company[:20] = torch.nan
    moved = torch.cat((company[:20], x[7:9]))
    assert torch.equal(product(moved)[20:], together[7:9])
    assert torch.equal(product(x.flip(0)).flip(0), together)


@pytest.mark.parametrize(("nope", "value", "latent"), [(48, 32, 64), (128, 16, 96)])
@pytest.mark.parametrize("N", [1, 19])
def test_heads_take_both_parts_of_kv_b_as_stored(nope: int, value: int, latent: int, N: int) -> None:
    H, rope = 3, 16
    kv_b = normal(H * (nope + value), latent).unflatten(0, (H, nope + value))
    key_up, value_up = kv_b[:, :nope], kv_b[:, nope:].transpose(1, 2)
    q = normal(N, H, nope + rope, seed=1)
    absorbed = torch.full((N + 2, H, latent + rope), torch.nan, dtype=BF16, device=DEVICE)
    head_matmul(q[..., :nope], key_up, absorbed[:N, :, :latent], role="decode")
    expected = torch.einsum("nhk,hkm->nhm", q[..., :nope].float(), key_up.float())
    torch.testing.assert_close(absorbed[:N, :, :latent].float(), expected, **TO_BF16)
    assert absorbed[N:].isnan().all()
    assert absorbed[..., latent:].isnan().all()

    attended = absorbed[:N, :, :latent]
    out = torch.full((N, H, value), torch.nan, dtype=BF16, device=DEVICE)
    head_matmul(attended, value_up, out, role="decode")
    expected = torch.einsum("nhk,hkm->nhm", attended.float(), value_up.float())
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-2)
    alone = torch.full((1, H, value), torch.nan, dtype=BF16, device=DEVICE)
    head_matmul(attended[N - 1 :], value_up, alone, role="decode")
    assert torch.equal(alone[0], out[N - 1])


@pytest.mark.parametrize("role", ["decode", "prefill"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_router_logits_are_as_good_as_fp32(role: Role, dtype: torch.dtype) -> None:
    x, weight = normal(9, 272), normal(80, 272, seed=1, dtype=dtype)
    logits = router_logits(inside(x), inside(weight), role)
    exact = x.double() @ weight.double().t()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-6, atol=ATOL)


def test_columns_choose_the_tile_and_rows_do_not() -> None:
    assert [width("decode", M) for M in (2048, 5632, 102400)] == ["narrow", "medium", "wide"]
    assert [width("prefill", M) for M in (2048, 5632, 102400)] == ["narrow", "wide", "wide"]


def test_refusals() -> None:
    x, weight = normal(2, 96), normal(48, 96, seed=1)
    for arguments, named in [
        ((x.float(), weight), "x_NK is torch.float32"),
        ((x, weight.float()), "weight_MK is torch.float32"),
        ((x[:, :80], weight), r"x_NK has shape \(2, 80\)"),
        ((x, weight, normal(32)), "bias_M has shape"),
        ((x, normal(96, 48).t()), "weight_MK has strides"),
        ((normal(2, 104)[:, 8:], weight), "x_NK has strides"),
        ((normal(2, 40), normal(48, 40)), "x_NK has rows of 40 elements"),
        ((normal(2, 112)[:, 4:100], weight), "x_NK begins at"),
        ((x, normal(40, 96)), "out_NM has rows of 40 elements"),
    ]:
        with pytest.raises(ValueError, match=named):
            linear(*arguments, role="decode")
    with pytest.raises(ValueError, match="float16 is neither"):
        linear(x, weight, role="decode", out_dtype=torch.float16)
    with pytest.raises(UnsupportedKernel, match=r"linear.*role=draft"):
        linear(x, weight, role="draft")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnsupportedKernel, match=r"head_matmul.*role=prefill"):
        head_matmul(normal(2, 1, 96), normal(1, 96, 48), normal(2, 1, 48), role="prefill")
    with pytest.raises(ValueError, match="neither K nor M is contiguous"):
        head_matmul(normal(2, 1, 96), normal(1, 96, 48, 2)[..., 0], normal(2, 1, 48), role="decode")
    with pytest.raises(ValueError, match=r"weight_EK is torch.float64"):
        router_logits(x, weight.double(), "decode")
