"""What every Triton kernel here shares: products and roundings that are exact under the interpreter too.

Under TRITON_INTERPRET=1 bf16 products and bf16 arithmetic are wrong and casts to bf16 truncate (Triton 3.6 to 3.9), so
kernels compute in fp32 and use `dot` and `to_bf16` for the rest. On a device both compile to the plain instruction.

The interpreter would hand a product to numpy's BLAS, where a row's sum may depend on its place among the rows: in
OpenBLAS's AVX2 kernels it does. An interpreted product is therefore summed over k in one order, every element alike.
"""

import triton
import triton.language as tl

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)  # read when a kernel module is imported, as triton.jit does
_UPCAST = tl.constexpr(INTERPRETED)
_MOST_ELEMENTS = tl.constexpr(tl.TRITON_MAX_TENSOR_NUMEL)


@triton.jit
def _interpreted_product(a, b):
    """a @ b in fp32, halved along k until a half's single products are as many as a Triton tensor may hold."""
    rows: tl.constexpr = a.shape[0]
    inner: tl.constexpr = a.shape[1]
    columns: tl.constexpr = b.shape[1]
    if rows * inner * columns <= _MOST_ELEMENTS:
        out = tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        a_first, a_rest = tl.split(a.reshape(rows, 2, inner // 2).permute(0, 2, 1))
        b_first, b_rest = tl.split(b.reshape(2, inner // 2, columns).permute(1, 2, 0))
        out = _interpreted_product(a_first, b_first) + _interpreted_product(a_rest, b_rest)
    return out


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with fp32 accumulation; a and b of one 16-bit, 8-bit or fp32 type (fp32: no TF32)."""
    if _UPCAST:
        acc += _interpreted_product(a.to(tl.float32), b.to(tl.float32))
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def to_bf16(x):
    """fp32 to bf16, to nearest even; NaN stays NaN."""
    if _UPCAST:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x == x, rounded, 0x7FC00000)
        x = rounded.to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to `dtype`: fp32 or bf16."""
    if dtype == tl.bfloat16:
        return to_bf16(x)
    return x.to(dtype)
