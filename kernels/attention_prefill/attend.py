"""Prefill attention: keys and values expanded from the latents as stored, causal over absolute positions.

A step's whole context is gathered and expanded segment by segment, a bounded number of tokens at a time; a row's state
(largest score, sum, weighted values) waits between them unrounded. A row meets the same key tiles at the same absolute
positions however its prompt is cut, and what a tile holds beyond the row changes nothing: its bits depend on its own
context alone. `plan` is the layout, made on the host.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_prefill.definition import HeadShape
from kernels.attention_prefill.plan import KEY_TILE, QUERY_TILE, TILE_FIELDS, PrefillPlan, Segment
from kernels.check import require, require_contiguous, require_rows
from kernels.lang import dot, to_bf16
from kernels.latents.gather import gather_latents
from kernels.table import Config, KernelSource, KernelSources, lookup

_HEADS_TOGETHER = 16  # of each tile, before the next tile: balances the ends of a step, and their keys fit the L2 cache
_LOG2_E = tl.constexpr(1.4426950408889634)
_TILE_FIELDS = tl.constexpr(TILE_FIELDS)


@triton.jit
def _attend(
    acc,
    peak,
    total,
    q_nope,
    q_pe,
    scale,
    position,
    keys,
    pe_keys,
    key_stride,
    pe_stride,
    first,
    end,
    limit,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Folds the key tiles from `first` up to `end` into the state; `keys`, `pe_keys` point at position 0's.

    Both forms do the same arithmetic, each product that is added to something in an explicit fma: how a prompt is cut
    decides which form a row meets a key tile in, and its bits must not differ. MASKED reads no key from `limit` on.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, R)
    v = tl.arange(0, V)
    for key in range(first, end, BLOCK_N):
        at = (key + n)[:, None]  # within a tile 32 bits do
        within = n[:, None] * key_stride
        tile = keys + tl.cast(key, tl.int64) * key_stride
        k_at = tile + (within + d[None, :])
        v_at = tile + (within + NOPE + v[None, :])
        pe_at = pe_keys + tl.cast(key, tl.int64) * pe_stride + (n[:, None] * pe_stride + r[None, :])
        if MASKED:
            k = tl.load(k_at, mask=(at < limit) & (d < NOPE)[None, :], other=0.0)
            k_pe = tl.load(pe_at, mask=at < limit, other=0.0)
            value = tl.load(v_at, mask=at < limit, other=0.0)
        else:
            k = tl.load(k_at) if NOPE == BLOCK_D else tl.load(k_at, mask=(d < NOPE)[None, :], other=0.0)
            k_pe = tl.load(pe_at)
            value = tl.load(v_at)
        scores = dot(q_nope, tl.trans(k), tl.zeros((q_nope.shape[0], BLOCK_N), tl.float32))
        scores = dot(q_pe, tl.trans(k_pe), scores)
        if MASKED:
            scores = tl.where(position[:, None] >= (key + n)[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(tl.fma(scores, scale[:, None], -new_peak[:, None]))
        rescale = tl.exp2(peak - new_peak)
        total = tl.fma(total, rescale, tl.sum(weights, axis=1))
        acc = dot(to_bf16(weights), value, acc * rescale[:, None])
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["num_tiles"])
def mla_prefill_kernel(  # noqa: PLR0915
    out,
    acc_state,
    peak_state,
    total_state,
    q,
    scales,
    kv,
    pe,
    tiles,
    num_tiles,
    num_heads,
    heads_together,
    q_row_stride,
    q_head_stride,
    kv_stride,
    pe_stride,
    NOPE: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (query tile, head): the tile's rows over the keys of this segment. Tiles as in `plan`."""
    program = tl.program_id(0)
    within = program % (num_tiles * heads_together)
    head = program // (num_tiles * heads_together) * heads_together + within % heads_together
    tile = tiles + (within // heads_together) * _TILE_FIELDS
    first_row = tl.load(tile)
    num_rows = tl.load(tile + 1)
    first_position = tl.load(tile + 2)
    key_begin = tl.load(tile + 3)
    key_end = tl.load(tile + 4)
    key_row = tl.load(tile + 5)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    r = tl.arange(0, R)
    v = tl.arange(0, V)
    real = m < num_rows
    row = (first_row + m).to(tl.int64)
    q_at = q + row * q_row_stride + head.to(tl.int64) * q_head_stride
    q_nope = tl.load(q_at[:, None] + d[None, :], mask=real[:, None] & (d < NOPE)[None, :], other=0.0)
    q_pe = tl.load(q_at[:, None] + NOPE + r[None, :], mask=real[:, None], other=0.0)
    scale = tl.load(scales + row, mask=real, other=1.0) * _LOG2_E

    state = row * num_heads + head
    state_acc = acc_state + (state * V)[:, None] + v[None, :]
    begun = real & (key_begin > 0)
    acc = tl.load(state_acc, mask=begun[:, None], other=0.0)
    peak = tl.load(peak_state + state, mask=begun, other=-float("inf"))
    total = tl.load(total_state + state, mask=begun, other=0.0)

    # Pointers to where position 0 would lie: only key_begin and what follows are read.
    before = (key_row - key_begin).to(tl.int64)
    keys = kv + before * kv_stride + head.to(tl.int64) * (NOPE + V)
    pe_keys = pe + before * pe_stride
    seen_by_all = tl.minimum(first_position + 1, key_end)
    whole = key_begin + tl.maximum(seen_by_all - key_begin, 0) // BLOCK_N * BLOCK_N
    acc, peak, total = _attend(
        acc, peak, total, q_nope, q_pe, scale, m, keys, pe_keys, kv_stride, pe_stride,
        key_begin, whole, key_end, NOPE, R, V, BLOCK_D, BLOCK_N, MASKED=False,
    )  # fmt: skip
    # Read again (volatile: not merged with the first time), so that it takes no registers through the loop.
    position = tl.load(tile + 2, volatile=True) + m
    acc, peak, total = _attend(
        acc, peak, total, q_nope, q_pe, scale, position, keys, pe_keys, kv_stride, pe_stride,
        whole, key_end, key_end, NOPE, R, V, BLOCK_D, BLOCK_N, MASKED=True,
    )  # fmt: skip

    first_row = tl.load(tile, volatile=True)
    num_rows = tl.load(tile + 1, volatile=True)
    real = m < num_rows
    state = (first_row + m).to(tl.int64) * num_heads + head
    if tl.load(tile + 6, volatile=True) != 0:
        state_acc = acc_state + (state * V)[:, None] + v[None, :]
        tl.store(state_acc, acc, mask=real[:, None])
        tl.store(peak_state + state, peak, mask=real)
        tl.store(total_state + state, total, mask=real)
    else:
        tl.store(out + (state * V)[:, None] + v[None, :], to_bf16(acc / total[:, None]), mask=real[:, None])


class LinearProduct(Protocol):
    """`kernels.products.bf16.linear`: rows of x may lie apart, a row's bits do not depend on the others."""

    def __call__(self, x_NK: Tensor, weight_MK: Tensor, /, *, role: Literal["prefill"]) -> Tensor: ...


class _State(NamedTuple):
    acc_NHV: Tensor
    peak_NH: Tensor
    total_NH: Tensor


def paged_mla_prefill(
    q_NHK: Tensor,
    scale_N: Tensor,
    cache: Tensor,
    plan: PrefillPlan,
    kv_b_w: Tensor,
    *,
    shape: HeadShape,
    linear: LinearProduct,
    config: Config | None = None,
) -> Tensor:
    """Attention of a step's rows, chunk after chunk as in `plan`, over all of their sequences up to themselves.

    `q_NHK` bf16, nope elements then rotated ones, unscaled, any strides but the last; `scale_N` fp32, positive; `cache`
    [blocks, block_size, C + R] bf16 or [.., bytes] uint8, which holds the step's own rows already; `kv_b_w` bf16
    [H * (nope + V), C]. Returns [N, H, V] bf16.
    """
    num_rows = plan.num_rows
    num_heads = shape.num_heads
    require("q_NHK", q_NHK, (num_rows, num_heads, shape.nope + shape.rope), torch.bfloat16)
    require_rows("q_NHK", q_NHK)
    require("scale_N", scale_N, (num_rows,), torch.float32)
    require_contiguous("scale_N", scale_N)
    require("kv_b_w", kv_b_w, (num_heads * (shape.nope + shape.value), shape.latent), torch.bfloat16)
    variant = f"nope={shape.nope},rope={shape.rope},value={shape.value}"
    config = config or lookup("mla_prefill", variant, q_NHK.device)
    if KEY_TILE % config.constants["BLOCK_N"]:
        raise ValueError(f"BLOCK_N is {config.constants['BLOCK_N']}, which does not divide {KEY_TILE}")
    out = q_NHK.new_empty(num_rows, num_heads, shape.value)
    state = _new_state(out, waits=plan.waits)
    for segment in plan.segments:
        latents_TL = gather_latents(cache, segment.slots_T, latent_rank=shape.latent, rope=shape.rope)
        kv_TX = linear(latents_TL[:, : shape.latent], kv_b_w, role="prefill")
        _launch(out, state, q_NHK, scale_N, kv_TX, latents_TL, segment, shape, config)
    return out


def _new_state(out_NHV: Tensor, *, waits: bool) -> _State:
    """Where rows wait between segments; if none does, nothing of it is read or written."""
    shape = out_NHV.shape if waits else (1, 1, out_NHV.shape[2])
    acc = torch.empty(shape, dtype=torch.float32, device=out_NHV.device)
    return _State(acc, acc.new_empty(shape[:2]), acc.new_empty(shape[:2]))


def _launch(
    out: Tensor,
    state: _State,
    q_NHK: Tensor,
    scale_N: Tensor,
    kv_TX: Tensor,
    latents_TL: Tensor,
    segment: Segment,
    shape: HeadShape,
    config: Config,
) -> None:
    num_tiles = segment.tiles.shape[0]
    heads = shape.num_heads
    together = next(count for count in range(min(heads, _HEADS_TOGETHER), 0, -1) if heads % count == 0)
    operands = (out, *state, q_NHK, scale_N, kv_TX, latents_TL[:, shape.latent :], segment.tiles)
    strides = (*q_NHK.stride()[:2], kv_TX.stride(0), latents_TL.stride(0))
    constants = _constants(shape.nope, shape.rope, shape.value)
    grid = (num_tiles * heads,)
    mla_prefill_kernel[grid](*operands, num_tiles, heads, together, *strides, **constants, **config.launch)


def _constants(nope: int, rope: int, value: int) -> dict[str, Any]:
    return {"NOPE": nope, "R": rope, "V": value, "BLOCK_D": triton.next_power_of_2(nope), "BLOCK_M": QUERY_TILE}


def _prefill_source(fields: Mapping[str, str]) -> KernelSource:
    fp32 = dict.fromkeys(("acc_state", "peak_state", "total_state", "scales"), "*fp32")
    bf16 = dict.fromkeys(("out", "q", "kv", "pe"), "*bf16")
    strides = dict.fromkeys(("q_row_stride", "q_head_stride", "kv_stride", "pe_stride"), "i32")
    counts = dict.fromkeys(("num_tiles", "num_heads", "heads_together"), "i32")
    constants = _constants(*(int(fields[name]) for name in ("nope", "rope", "value")))
    signature = {**fp32, **bf16, "tiles": "*i32", **counts, **strides}
    return KernelSource(mla_prefill_kernel, signature, constants, (*fp32, *bf16, "tiles", *strides))


SOURCES: KernelSources = {"mla_prefill": _prefill_source}
