"""The device sampler's walk through one row's distribution: bins, then the few elements whose exact place matters.

Order is by descending logit, then id. A weight is the integer floor(2^40 * p / p_max), so every sum here is exact and
has no order. What is kept is always a prefix of that order, so it is known by its sum alone:

    kept = min(S_k, S_p, S_m)      sums of what top_k (all ties), top_p (in that order) and min_p (weights alone) keep
    the token is where the cumulated weight first passes floor(u * kept)

Bins are 32 ranges of distance to the highest logit, finer near it. Their sums bound S_k, S_p and the draw; `gather`
lists the elements of the bins that those bounds touch, in the order of ids, and `finish` is exact on the list.
"""

import triton
import triton.language as tl

from kernels.sampler.parameters import (
    DRAW,
    MIN_WEIGHT,
    ROW_WORDS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TOP_P_SHIFT,
    best_of,
    has_entries,
    load_float,
)

NUM_BINS = tl.constexpr(32)
LIST_LENGTH = tl.constexpr(32768)  # of a row's list; a row that needs more is walked as a whole

# A row's plan, in words of 64 bits: cumulated counts and weights of the bins, the weight of what min_p keeps, a mask of
# the touched bins, and how many ids those hold.
COUNTS, SUMS, MIN_SUM, TOUCHED, LENGTH, PLAN_WORDS = (tl.constexpr(at) for at in (0, 32, 64, 65, 66, 67))


@triton.jit
def weigh(x, highest, temperature):
    """floor(2^40 * p / p_max) of logits."""
    return (tl.exp((x.to(tl.float64) - highest.to(tl.float64)) / temperature) * 1099511627776.0).to(tl.int64)


@triton.jit
def bin_of(x, highest, temperature):
    """Bin by distance / temperature: eight each in [0, 2), [2, 6), [6, 14) and from 14 on; in the last, weights are 0.

    One rounding each, so that every kernel finds the same bin.
    """
    inverse = (1.0 / tl.maximum(temperature, 1e-38)).to(tl.float32)
    distance = tl.fma(highest - x, inverse, 2.0)
    return tl.minimum((distance.to(tl.int32, bitcast=True) >> 20) - 1024, NUM_BINS - 1)


@triton.jit
def key(x):
    """An integer that orders like x, minus zero as zero."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def drawn(bits, kept):
    """bits * kept >> 24 of 24 bits and up to 58."""
    return bits * (kept >> 24) + ((bits * (kept & 0xFFFFFF)) >> 24)


@triton.jit
def share(numerator, shift, total):
    """ceil(numerator * total / 2^shift), at least 1; a product of up to 111 bits, shift in [1, 116]."""
    low = numerator.to(tl.uint64) * total.to(tl.uint64)
    high = tl.umulhi(numerator.to(tl.uint64), total.to(tl.uint64))
    one = low * 0 + 1
    near = tl.minimum(shift, 63).to(tl.uint64)
    far = tl.minimum(tl.maximum(shift - 64, 0), 63).to(tl.uint64)
    small = (high << (64 - near)) | (low >> near)
    is_cut = tl.where(shift < 64, low & ((one << near) - 1), low | (high & ((one << far) - 1))) != 0
    quotient = tl.where(shift < 64, small, high >> far).to(tl.int64)
    return tl.maximum(quotient + is_cut.to(tl.int64), 1)


@triton.jit
def first_bin(cumulated, target):
    """The first one at which the cumulated sum reaches the target."""
    return tl.minimum(tl.sum((cumulated < target).to(tl.int32), axis=0), NUM_BINS - 1)


@triton.jit
def value_at(values, index, SIZE: tl.constexpr):
    """values[index]; 0 outside."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == index, values, 0), axis=0)


@triton.jit
def _bins_from_to(first, last):
    one = first.to(tl.int64) * 0 + 1
    return (one << (last + 1).to(tl.int64)) - (one << first.to(tl.int64))


@triton.jit
def kept_by_top_k(counts, top_k, vocab):
    """Whether top_k cuts among tokens that have a weight, and the bin of the last one it keeps."""
    bin = first_bin(counts, top_k)
    return (top_k > 0) & (top_k < vocab) & (bin < NUM_BINS - 1), bin


@triton.jit
def _touched_bins(counts, sums, min_sum, row_words, bits, vocab):
    """A mask of the bins that top_k, top_p and the draw can end in, from the least and most each sum can be."""
    total = value_at(sums, NUM_BINS - 1, NUM_BINS)
    cuts, bin = kept_by_top_k(counts, tl.load(row_words + TOP_K), vocab)
    least = tl.where(cuts, tl.maximum(value_at(sums, bin - 1, NUM_BINS), 1), total)
    most = tl.where(cuts, value_at(sums, bin, NUM_BINS), total)
    touched = tl.where(cuts, _bins_from_to(bin, bin), 0)
    shift = tl.load(row_words + TOP_P_SHIFT)
    if shift > 0:
        least = share(tl.load(row_words + TOP_P), shift, least)
        last = first_bin(sums, share(tl.load(row_words + TOP_P), shift, most))
        touched |= _bins_from_to(first_bin(sums, least), last)
        most = tl.minimum(most, value_at(sums, last, NUM_BINS))
    least = first_bin(sums, drawn(bits, tl.minimum(least, min_sum)) + 1)
    return touched | _bins_from_to(least, first_bin(sums, drawn(bits, tl.minimum(most, min_sum)) + 1))


@triton.jit
def bins_kernel(
    bin_sums, bin_counts, min_sums, logits, rows, modes, maxima, best, vocab, stride,
    CHUNK: tl.constexpr, LANES: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row): weights and counts of the chunk by bin, and the weight of what min_p alone keeps.

    A lane keeps the bins of its own elements, at most 128, which in a thread are registers.
    """
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    if tl.load(modes + row) == DRAW:
        row_words = rows + row * ROW_WORDS
        highest, _ = best_of(maxima, best, row, has_entries(row_words), num_chunks, MAX_CHUNKS)
        temperature = load_float(row_words, TEMPERATURE)
        min_weight = tl.load(row_words + MIN_WEIGHT)
        bins = tl.arange(0, NUM_BINS)
        packed = tl.zeros((NUM_BINS, LANES), tl.int64)  # sum below bit 48, count above
        kept = tl.zeros((LANES,), tl.int64)
        for start in range(0, tl.minimum(CHUNK, vocab - chunk * CHUNK), LANES):
            ids = chunk * CHUNK + start + tl.arange(0, LANES)
            inside = ids < vocab
            x = tl.load(logits + row * stride + ids, mask=inside, other=float("-inf"))
            weight = weigh(x, highest, temperature)
            bin = bin_of(x, highest, temperature)
            kept += tl.where(weight >= min_weight, weight, 0)
            word = tl.where(inside, weight + (1 << 48), 0)
            packed += tl.where(bin[None, :] == bins[:, None], word[None, :], 0)
        part = row * num_chunks + chunk
        tl.store(bin_sums + part * NUM_BINS + bins, tl.sum(packed & ((1 << 48) - 1), axis=1))
        tl.store(bin_counts + part * NUM_BINS + bins, tl.sum((packed >> 48).to(tl.int32), axis=1))
        tl.store(min_sums + part, tl.sum(kept, axis=0))


@triton.jit
def plan_kernel(
    plans, offsets, bin_sums, bin_counts, min_sums, rows, modes, bits, vocab, num_chunks, MAX_CHUNKS: tl.constexpr
):
    """One program per row: what its chunks' bins add up to, which bins are touched, where each chunk's ids begin."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(modes + row) == DRAW:
        chunk = tl.arange(0, MAX_CHUNKS)
        bin = tl.arange(0, NUM_BINS)
        has = chunk < num_chunks
        at = (row * num_chunks + chunk)[:, None] * NUM_BINS + bin[None, :]
        of_chunks = tl.load(bin_counts + at, mask=has[:, None], other=0).to(tl.int64)
        counts = tl.cumsum(tl.sum(of_chunks, axis=0), axis=0)
        sums = tl.cumsum(tl.sum(tl.load(bin_sums + at, mask=has[:, None], other=0), axis=0), axis=0)
        min_sum = tl.sum(tl.load(min_sums + row * num_chunks + chunk, mask=has, other=0), axis=0)
        touched = _touched_bins(counts, sums, min_sum, rows + row * ROW_WORDS, tl.load(bits + row), vocab)
        listed = tl.sum(of_chunks * ((touched >> bin.to(tl.int64)) & 1)[None, :], axis=1)
        ends = tl.cumsum(listed, axis=0)
        tl.store(offsets + row * num_chunks + chunk, (ends - listed).to(tl.int32), mask=has)
        plan = plans + row * PLAN_WORDS
        tl.store(plan + COUNTS + bin, counts)
        tl.store(plan + SUMS + bin, sums)
        tl.store(plan + MIN_SUM, min_sum)
        tl.store(plan + TOUCHED, touched)
        tl.store(plan + LENGTH, tl.sum(listed, axis=0))


@triton.jit
def gather_kernel(
    lists, plans, offsets, logits, rows, modes, maxima, best, vocab, stride,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, row): the chunk's part of the list of ids in touched bins, unless the list is too long."""
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    plan = plans + row * PLAN_WORDS
    wanted = tl.load(modes + row) == DRAW
    if wanted:
        wanted = tl.load(plan + LENGTH) <= LIST_LENGTH
    if wanted:
        row_words = rows + row * ROW_WORDS
        highest, _ = best_of(maxima, best, row, has_entries(row_words), num_chunks, MAX_CHUNKS)
        temperature = load_float(row_words, TEMPERATURE)
        touched = tl.load(plan + TOUCHED)
        end = tl.load(offsets + row * num_chunks + chunk)
        for start in range(0, tl.minimum(CHUNK, vocab - chunk * CHUNK), BLOCK):
            ids = chunk * CHUNK + start + tl.arange(0, BLOCK)
            x = tl.load(logits + row * stride + ids, mask=ids < vocab, other=float("-inf"))
            bin = bin_of(x, highest, temperature)
            listed = (((touched >> bin.to(tl.int64)) & 1) != 0) & (ids < vocab)
            places = end + tl.cumsum(listed.to(tl.int32), axis=0)
            tl.store(lists + row * LIST_LENGTH + places - 1, ids, mask=listed)
            end = tl.max(places, axis=0)
