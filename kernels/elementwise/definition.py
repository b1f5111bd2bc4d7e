"""Work on rows of the residual stream in plain torch: RMS norm and SwiGLU."""

from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Normalised in fp32, cast to x's dtype, then scaled in it, as transformers does."""
    x32 = x.float()
    mean_square = (x32 * x32).sum(-1, keepdim=True).mul_(1.0 / x.shape[-1])
    return (x32 / mean_square.add_(eps).sqrt_()).to(x.dtype) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2 * width], gate first; computed in fp32."""
    width = gate_up.shape[-1] // 2
    x = gate_up.float()
    gate = x.narrow(-1, 0, width)
    return (gate / (-gate).exp_().add_(1.0)).mul_(x.narrow(-1, width, width)).to(gate_up.dtype)
