"""Prefill attention of one prompt, expansion of keys and values included, against torch doing the same."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_timing import Ceilings, Report, Timer
from benchmarks.kernels.cells import BLOCK, LATENT, ROPE, ROW
from benchmarks.kernels.products import made, normal, relative_error
from kernels.attention_prefill.attend import paged_mla_prefill
from kernels.attention_prefill.definition import HeadShape
from kernels.attention_prefill.plan import PrefillPlan
from kernels.products import bf16
from kernels.products.bf16 import Role

NOPE = 128
VALUE = 128
SHAPES = ((16, 1 << 10), (16, 4 << 10), (16, 16 << 10), (128, 4 << 10))
SCALE = (NOPE + ROPE) ** -0.5


def linear(x_NK: Tensor, weight_MK: Tensor, *, role: Role) -> Tensor:
    return bf16.linear(x_NK, weight_MK, role=role)


def by_torch(q_NHK: Tensor, latents_NL: Tensor, kv_b_w: Tensor) -> Tensor:
    """[N, H, V]: expansion by cuBLAS, then scaled_dot_product_attention on contiguous keys."""
    N, H = q_NHK.shape[:2]
    kv = (latents_NL[:, :LATENT] @ kv_b_w.T).view(N, H, NOPE + VALUE)
    keys = torch.cat((kv[..., :NOPE], latents_NL[:, None, LATENT:].expand(N, H, ROPE)), dim=-1)
    parts = (part.transpose(0, 1).unsqueeze(0) for part in (q_NHK, keys, kv[..., NOPE:]))
    out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=SCALE)
    return out[0].transpose(0, 1)


def measure(heads: int, tokens: int, ceilings: Ceilings, timer: Timer) -> list[str]:
    shape = HeadShape(heads, NOPE, ROPE, VALUE, LATENT)
    num_blocks = 2 * -(-tokens // BLOCK)
    cache = normal(timer, num_blocks, BLOCK, ROW)
    table = torch.randperm(num_blocks).tolist()
    plan = PrefillPlan.build([(0, tokens, table)], BLOCK, timer.device)
    q = normal(timer, tokens, heads, NOPE + ROPE)
    kv_b_w = normal(timer, heads * (NOPE + VALUE), LATENT, std=LATENT**-0.5)
    scale = torch.full((tokens,), SCALE, device=timer.device)
    latents = cache[torch.tensor(table, device=timer.device)].flatten(0, 1)[:tokens]

    def ours(_: int) -> Tensor:
        return paged_mla_prefill(q, scale, cache, plan, kv_b_w, shape=shape, linear=linear)

    few = min(tokens, 1024)
    error = relative_error(ours(0)[:few], by_torch(*(part.float() for part in (q[:few], latents[:few], kv_b_w))))
    taken = timer.compare({"ours": ours, "torch": lambda _: by_torch(q, latents, kv_b_w)}, 2)
    mine, theirs = (taken[name].median if name in taken else float("nan") for name in ("ours", "torch"))
    expansion = 2 * LATENT * heads * (NOPE + VALUE) * tokens
    flops = expansion + heads * (NOPE + ROPE + VALUE) * tokens * (tokens + 1)
    figures = [f"{heads}", f"{tokens:,}", f"{mine * 1e6:,.0f}", f"{flops / mine / 1e12:.0f}"]
    return [*figures, f"{flops / mine / ceilings.matmul_flops:.0%}", f"{theirs / mine:.2f}", error]


def table(ceilings: Ceilings, report: Report, timer: Timer) -> None:
    shapes = ((2, 130),) if timer.is_dry else SHAPES
    rows = made([partial(measure, *shape, ceilings, timer) for shape in shapes], timer)
    note = (
        "Prefill attention, one prompt: gather, expansion, causal attention. torch: cuBLAS, cat, SDPA on the same rows."
    )
    report.table(("heads", "tokens", "us", "TFLOP/s", "of matmul", "x torch", "relative error"), rows, note)
