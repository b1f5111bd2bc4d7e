"""The sampler on the device: what `isthmus.engine.sampler` says, row by row; no row depends on another.

    stats    chunks of raw logits: highest, its lowest id, finite or not, sum of exponentials where a logprob is wanted
    adjust   a program per row: plain argmax and bad rows are done; bias, penalties, mask go into the logits, in place
    stats    again, for rows that were adjusted
    bins     for rows that draw: weights by distance to the highest logit (select.py)
    plan     a program per row: the few bins in which top_k, top_p or the draw can end
    gather   the ids in those bins
    finish   a program per row: the exact draw, the logprob; adjusted logits get their raw values back

Integer sums have no order; every other fold has one that depends on the vocabulary alone. Of the host's numbers only
fp64 `exp` and `log` may differ, in their last bit, and so a weight by one, of up to 2^40.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.check import require, require_contiguous
from kernels.sampler.finish import finish_kernel
from kernels.sampler.parameters import (
    ADJUSTED_ARGMAX,
    DONE,
    DRAW,
    END_ENTRY,
    END_FLAG,
    ENTRY_FIELDS,
    ENTRY_WORDS,
    FIRST_ENTRY,
    FORBIDS_ENDS,
    FREQUENCY,
    INDEX,
    NEEDS_LOGPROB,
    PRESENCE,
    REPETITION,
    ROW_FIELDS,
    ROW_WORDS,
    SEED,
    SEEN_FLAG,
    TEMPERATURE,
    SamplerInputs,
    best_of,
    has_entries,
    load_float,
    log_total,
)
from kernels.sampler.select import LIST_LENGTH, NUM_BINS, PLAN_WORDS, bins_kernel, gather_kernel, plan_kernel
from kernels.table import Config, KernelSource, KernelSources, lookup

__all__ = ["MAX_VOCAB", "Sampled", "SamplerInputs", "sample_logits"]

_VARIANT = "logits=fp32"
_MAX_CHUNKS = 64  # a fold over chunks is one vector of this size
MAX_VOCAB = _MAX_CHUNKS * 4096
_SEEN = tl.constexpr(SEEN_FLAG)
_END = tl.constexpr(END_FLAG)
_LOW_WORD = tl.constexpr(0xFFFFFFFF)
_LARGEST = tl.constexpr(3.4028234663852886e38)  # of finite fp32


@triton.jit
def stats_kernel(
    maxima, best, totals, finite, logits, rows, modes, vocab, stride,
    ADJUSTED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row). ADJUSTED: only rows with entries that are still to be chosen from, highest and id alone."""
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    row_words = rows + row * ROW_WORDS
    wanted = True
    if ADJUSTED:
        wanted = (tl.load(modes + row) != DONE) & (has_entries(row_words) != 0)
    if wanted:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = ids < vocab
        x = tl.load(logits + row * stride + ids, mask=inside, other=float("-inf"))
        highest = tl.max(x, axis=0)
        place = (row * 2 + (1 if ADJUSTED else 0)) * num_chunks + chunk
        tl.store(maxima + place, highest)
        tl.store(best + place, tl.min(tl.where(x == highest, ids, 0x7FFFFFFF), axis=0))
        if not ADJUSTED:
            is_finite = (tl.abs(x) <= _LARGEST) | (ids >= vocab)
            all_finite = tl.min(is_finite.to(tl.int32), axis=0)
            tl.store(finite + row * num_chunks + chunk, all_finite)
            if (tl.load(row_words + NEEDS_LOGPROB) != 0) & (all_finite != 0):
                total = tl.sum(tl.exp(x.to(tl.float64) - highest.to(tl.float64)), axis=0)
                tl.store(totals + row * num_chunks + chunk, total)


@triton.jit
def uniform_bits(seed, index):
    """`isthmus.engine.philox.uniform_bits`: the top 24 bits of Philox4x32-10 at counter (index, 0, 0, 0)."""
    k0 = seed.to(tl.uint64) & _LOW_WORD
    k1 = seed.to(tl.uint64) >> 32
    c0 = index.to(tl.uint64) & _LOW_WORD
    c1 = c0 * 0
    c2 = c0 * 0
    c3 = c0 * 0
    for _ in tl.static_range(10):
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW_WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW_WORD
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_WORD, (k1 + 0xBB67AE85) & _LOW_WORD
    return (c0 >> 8).to(tl.int64)


@triton.jit
def _clipped(x):
    return tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)


@triton.jit
def _rounded(x):
    """fp64 to the nearest fp32, as fp64; infinite beyond its range. Of one operation on fp32 values: its fp32 result.

    It also keeps a product and a sum from being fused.
    """
    infinite = tl.where(x > 0, float("inf"), float("-inf"))
    return tl.where(tl.abs(x) > _LARGEST, infinite, _clipped(x).to(tl.float32).to(tl.float64))


@triton.jit
def _adjusted(raw, bias, count, flags, row_words):
    """A finite logit with bias, penalties and mask, in the order and with the roundings of the host's sampler."""
    repetition = load_float(row_words, REPETITION)
    value = (raw + bias).to(tl.float64)
    repeated = _rounded(_clipped(tl.where(value > 0, value / repetition, value * repetition)))
    value = tl.where((flags & _SEEN) != 0, repeated, value)
    penalty = _rounded(count.to(tl.float64) * load_float(row_words, FREQUENCY))
    penalty = _rounded(penalty + load_float(row_words, PRESENCE))
    value = tl.where(count > 0, value - penalty, value)
    forbidden = ((flags & _END) != 0) & (tl.load(row_words + FORBIDS_ENDS) != 0)
    return tl.where(forbidden, float("-inf"), _clipped(value).to(tl.float32))


@triton.jit(do_not_specialize=["num_rows"])  # the batch changes from step to step
def adjust_kernel(
    result, modes, bits, saved, logits, rows, entries, maxima, best, totals, finite, stride, num_chunks, num_rows,
    BLOCK: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program per row: finishes it, or says what is left to do and changes its logits where it has entries.

    `result` [3, rows]: token, bits of the logprob, whether the logits are finite. A row that is not gets token 0.
    """
    row = tl.program_id(0).to(tl.int64)
    row_words = rows + row * ROW_WORDS
    chunk = tl.arange(0, MAX_CHUNKS)
    of_chunks = tl.load(finite + row * num_chunks + chunk, mask=chunk < num_chunks, other=1)
    is_finite = tl.min(of_chunks, axis=0)
    highest, token = best_of(maxima, best, row, 0, num_chunks, MAX_CHUNKS)
    tl.store(result + row, tl.where(is_finite != 0, token, 0))
    tl.store(result + 2 * num_rows + row, is_finite)
    mode = tl.where(
        load_float(row_words, TEMPERATURE) > 0, DRAW, tl.where(has_entries(row_words) != 0, ADJUSTED_ARGMAX, DONE)
    )
    mode = tl.where(is_finite != 0, mode, DONE)
    tl.store(modes + row, mode)
    logprob = 0.0
    if (tl.load(row_words + NEEDS_LOGPROB) != 0) & (is_finite != 0):
        logprob = (highest.to(tl.float64) - log_total(maxima, totals, row, num_chunks, MAX_CHUNKS)).to(tl.float32)
    tl.store(result + num_rows + row, logprob.to(tl.int32, bitcast=True))
    if mode == DRAW:
        tl.store(bits + row, uniform_bits(tl.load(row_words + SEED), tl.load(row_words + INDEX)))
    if mode != DONE:
        end = tl.load(row_words + END_ENTRY)
        for start in range(tl.load(row_words + FIRST_ENTRY), end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            words = entries + at * ENTRY_WORDS
            x = logits + row * stride + tl.load(words, mask=inside, other=0)
            raw = tl.load(x, mask=inside, other=0.0)
            bias = tl.load(words + 1, mask=inside, other=0).to(tl.float32, bitcast=True)
            count = tl.load(words + 2, mask=inside, other=0)
            flags = tl.load(words + 3, mask=inside, other=0)
            tl.store(saved + at, raw, mask=inside)
            tl.store(x, _adjusted(raw, bias, count, flags, row_words), mask=inside)


class Sampled(NamedTuple):
    """What came of B rows, on the device: views of `packed` [3, B] int32, which one copy brings to the host."""

    packed: Tensor

    @property
    def tokens(self) -> Tensor:
        """[B] int32; 0 where the logits are not finite."""
        return self.packed[0]

    @property
    def logprobs(self) -> Tensor:
        """[B] fp32, of the raw logits; 0 where none was asked for."""
        return self.packed[1].view(torch.float32)

    @property
    def finite(self) -> Tensor:
        """[B] int32: 1 where every logit is finite."""
        return self.packed[2]


def sample_logits(logits_BV: Tensor, inputs: SamplerInputs, configs: Mapping[str, Config] | None = None) -> Sampled:
    """A token for each row of contiguous fp32 logits, by the parameters of its row in `inputs`; nothing waits.

    Logits named by entries change during the call and are restored by it. Raises ValueError, UnsupportedKernel.
    """
    require("logits_BV", logits_BV, (None, None), torch.float32)
    require_contiguous("logits_BV", logits_BV)
    num_rows = len(logits_BV)
    require("rows", inputs.rows, (num_rows, len(ROW_FIELDS)), torch.int64)
    require("entries", inputs.entries, (None, len(ENTRY_FIELDS)), torch.int32)
    require_contiguous("rows", inputs.rows)
    require_contiguous("entries", inputs.entries)
    configs = configs or {name: lookup(name, _VARIANT, logits_BV.device) for name in SOURCES}
    sampled = Sampled(logits_BV.new_empty(3, num_rows, dtype=torch.int32))
    if num_rows:
        _launch(sampled.packed, logits_BV, inputs, configs)
    return sampled


def _launch(packed: Tensor, logits: Tensor, inputs: SamplerInputs, configs: Mapping[str, Config]) -> None:
    num_rows, vocab = logits.shape
    chunk = configs["sampler_stats"].constants["CHUNK"]
    num_chunks = triton.cdiv(vocab, chunk)
    if num_chunks > _MAX_CHUNKS or not vocab:
        raise ValueError(f"the vocabulary is {vocab}, not 1 to {_MAX_CHUNKS * chunk}")
    if any(configs[name].constants["CHUNK"] != chunk for name in ("sampler_bins", "sampler_gather")):
        raise ValueError("the sampler's kernels have different chunks")

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    per_chunk = num_rows, num_chunks
    modes = scratch(torch.int32, num_rows)
    bits = scratch(torch.int64, num_rows)
    saved = scratch(torch.float32, len(inputs.entries))
    highest = scratch(torch.float32, num_rows, 2, num_chunks), scratch(torch.int32, num_rows, 2, num_chunks)
    totals = scratch(torch.float64, *per_chunk)
    finite = scratch(torch.int32, *per_chunk)
    bin_sums = scratch(torch.int64, *per_chunk, NUM_BINS.value)
    bin_counts = scratch(torch.int32, *per_chunk, NUM_BINS.value)
    sums = bin_sums, bin_counts, scratch(torch.int64, *per_chunk)
    plans = scratch(torch.int64, num_rows, PLAN_WORDS.value)
    offsets = scratch(torch.int32, *per_chunk)
    lists = scratch(torch.int32, num_rows, LIST_LENGTH.value)
    chunks = (num_chunks, num_rows)
    each = (num_rows,)
    size = (vocab, logits.stride(0))
    stats, adjust, bins, plan, gather, finish = (configs[name].launch for name in SOURCES)
    fold = {"MAX_CHUNKS": _MAX_CHUNKS}
    of_rows = logits, inputs.rows, modes
    stats_kernel[chunks](*highest, totals, finite, *of_rows, *size, ADJUSTED=False, **stats)
    adjust_kernel[each](
        packed, modes, bits, saved, logits, inputs.rows, inputs.entries, *highest, totals, finite,
        size[1], num_chunks, num_rows, **fold, **adjust,
    )  # fmt: skip
    stats_kernel[chunks](*highest, totals, finite, *of_rows, *size, ADJUSTED=True, **stats)
    bins_kernel[chunks](*sums, *of_rows, *highest, *size, **fold, **bins)
    plan_kernel[each](plans, offsets, *sums, inputs.rows, modes, bits, vocab, num_chunks, **fold, **plan)
    gather_kernel[chunks](lists, plans, offsets, *of_rows, *highest, *size, **fold, **gather)
    finish_kernel[each](
        packed, saved, inputs.entries, lists, plans, *of_rows, bits, *highest, totals, *size, num_chunks, num_rows,
        **fold, **finish,
    )  # fmt: skip


_POINTERS = {
    "maxima": "*fp32", "best": "*i32", "totals": "*fp64", "finite": "*i32", "logits": "*fp32", "rows": "*i64",
    "modes": "*i32", "result": "*i32", "saved": "*fp32", "entries": "*i32", "bin_sums": "*i64", "bin_counts": "*i32",
    "min_sums": "*i64", "lists": "*i32", "plans": "*i64", "offsets": "*i32", "bits": "*i64",
}  # fmt: skip
_SIZES = {"vocab": "i32", "stride": "i32", "num_chunks": "i32", "num_rows": "i32"}


def _source(kernel: Any, **constants: Any) -> KernelSource:
    aligned = (*(name for name in kernel.arg_names if name in _POINTERS), *({"vocab", "stride"} & {*kernel.arg_names}))
    return KernelSource(kernel, _POINTERS | _SIZES, constants, tuple(aligned))


SOURCES: KernelSources = {
    "sampler_stats": lambda fields: _source(stats_kernel, ADJUSTED=False),
    "sampler_adjust": lambda fields: _source(adjust_kernel, MAX_CHUNKS=_MAX_CHUNKS),
    "sampler_bins": lambda fields: _source(bins_kernel, MAX_CHUNKS=_MAX_CHUNKS),
    "sampler_plan": lambda fields: _source(plan_kernel, MAX_CHUNKS=_MAX_CHUNKS),
    "sampler_gather": lambda fields: _source(gather_kernel, MAX_CHUNKS=_MAX_CHUNKS),
    "sampler_finish": lambda fields: _source(finish_kernel, MAX_CHUNKS=_MAX_CHUNKS),
}
