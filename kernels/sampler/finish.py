"""The device sampler's last kernel: what `select` bounded is made exact on the list that it gathered.

A search is for the highest key at which a cumulated count or weight reaches what is needed: seven thresholds a round
between the lowest and highest key of one bin, so a bin of one distinct logit needs no round, and none more than eleven.
"""

import triton
import triton.language as tl

from kernels.sampler.parameters import (
    DONE,
    DRAW,
    END_ENTRY,
    ENTRY_WORDS,
    FIRST_ENTRY,
    NEEDS_LOGPROB,
    ROW_WORDS,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TOP_P_SHIFT,
    best_of,
    has_entries,
    load_float,
    log_total,
)
from kernels.sampler.select import (
    COUNTS,
    LENGTH,
    LIST_LENGTH,
    MIN_SUM,
    NUM_BINS,
    PLAN_WORDS,
    SUMS,
    bin_of,
    drawn,
    first_bin,
    kept_by_top_k,
    key,
    share,
    value,
    value_at,
    weigh,
)

_FAN = tl.constexpr(8)
_MOST = tl.constexpr(1 << 40)  # beyond every key


@triton.jit
def _elements(x_row, listed, length, is_listed, start, LANES: tl.constexpr):
    """Ids and logits of LANES places of the list, or of the whole row where the list is not to be had."""
    at = start + tl.arange(0, LANES)
    inside = at < length
    ids = tl.where(is_listed, tl.load(listed + at, mask=inside & is_listed, other=0), at)
    return ids, tl.load(x_row + ids, mask=inside, other=float("-inf")), inside


@triton.jit
def _sums_from(
    thresholds, x_row, listed, length, is_listed, highest, temperature, bin, COUNT: tl.constexpr, LANES: tl.constexpr
):
    """[_FAN]: count or weight of the bin's elements whose key is at least each threshold."""
    sums = tl.zeros((_FAN, LANES), tl.int64)
    for start in range(0, length, LANES):
        _, x, inside = _elements(x_row, listed, length, is_listed, start, LANES)
        weight = 1 if COUNT else weigh(x, highest, temperature)
        weight = tl.where(inside & (bin_of(x, highest, temperature) == bin), weight, 0).to(tl.int64)
        sums += tl.where(key(x)[None, :] >= thresholds[:, None], weight[None, :], 0)
    return tl.sum(sums, axis=1)


@triton.jit
def _search(
    needed, x_row, listed, length, is_listed, highest, temperature, bin, COUNT: tl.constexpr, LANES: tl.constexpr
):
    """The highest key of the bin from which on the sum is at least `needed`, and the sum above that key.

    The sum from `low` on is always enough, from `high` on never.
    """
    lows = tl.zeros((LANES,), tl.int64) + _MOST
    highs = tl.zeros((LANES,), tl.int64) - _MOST
    for start in range(0, length, LANES):
        _, x, inside = _elements(x_row, listed, length, is_listed, start, LANES)
        mine = inside & (bin_of(x, highest, temperature) == bin)
        lows = tl.minimum(lows, tl.where(mine, key(x), _MOST))
        highs = tl.maximum(highs, tl.where(mine, key(x), -_MOST))
    low = tl.min(lows, axis=0)
    high = tl.max(highs, axis=0) + 1
    above = needed * 0
    while high - low > 1:
        step = (high - low + _FAN - 1) // _FAN
        thresholds = low + tl.arange(0, _FAN) * step
        sums = _sums_from(thresholds, x_row, listed, length, is_listed, highest, temperature, bin, COUNT, LANES)
        last = tl.sum((sums >= needed).to(tl.int32), axis=0)  # the first threshold that is too high
        next_high = low + last * step
        above = tl.where(next_high < high, value_at(sums, last, _FAN), above)
        high = tl.minimum(high, next_high)
        low += (last - 1) * step
    return low, above


@triton.jit
def _nth(rank, own_key, x_row, listed, length, is_listed, LANES: tl.constexpr):
    """The id of the element number `rank`, from 0, among those of one key, in the order of ids."""
    seen = rank * 0
    found = tl.full((LANES,), -1, tl.int32)
    for start in range(0, length, LANES):
        ids, x, inside = _elements(x_row, listed, length, is_listed, start, LANES)
        equal = inside & (key(x) == own_key)
        numbers = tl.cumsum(equal.to(tl.int32), axis=0) - 1 + seen
        found = tl.where(equal & (numbers <= rank), ids, found)
        seen += tl.sum(equal.to(tl.int32), axis=0)
    return tl.max(found, axis=0)


@triton.jit
def _draw(
    row_words, plan, bits, x_row, listed, highest, vocab, LANES: tl.constexpr
):  # fmt: skip
    """The token of one row."""
    bins = tl.arange(0, NUM_BINS)
    counts = tl.load(plan + COUNTS + bins)
    sums = tl.load(plan + SUMS + bins)
    kept = tl.load(plan + MIN_SUM)
    length = tl.load(plan + LENGTH)
    temperature = load_float(row_words, TEMPERATURE)
    is_listed = length <= LIST_LENGTH
    length = tl.where(is_listed, length, vocab).to(tl.int32)
    total = value_at(sums, NUM_BINS - 1, NUM_BINS)
    top_k = tl.load(row_words + TOP_K)
    cuts, bin = kept_by_top_k(counts, top_k, vocab)
    if cuts:
        before = value_at(counts, bin - 1, NUM_BINS)
        last_key, _ = _search(
            top_k - before, x_row, listed, length, is_listed, highest, temperature, bin, COUNT=True, LANES=LANES
        )  # fmt: skip
        thresholds = last_key + tl.arange(0, _FAN)
        of_bin = _sums_from(
            thresholds, x_row, listed, length, is_listed, highest, temperature, bin, COUNT=False, LANES=LANES
        )
        total = value_at(sums, bin - 1, NUM_BINS) + value_at(of_bin, 0, _FAN)
    kept = tl.minimum(kept, total)
    shift = tl.load(row_words + TOP_P_SHIFT)
    if shift > 0:
        target = share(tl.load(row_words + TOP_P), shift, total)
        bin = first_bin(sums, target)
        before = value_at(sums, bin - 1, NUM_BINS)
        last_key, above = _search(
            target - before, x_row, listed, length, is_listed, highest, temperature, bin, COUNT=False, LANES=LANES
        )  # fmt: skip
        weight = weigh(value(last_key), highest, temperature)
        before += above
        kept = tl.minimum(kept, before + (target - before + weight - 1) // weight * weight)
    target = drawn(bits, kept)
    bin = first_bin(sums, target + 1)
    before = value_at(sums, bin - 1, NUM_BINS)
    own_key, above = _search(
        target + 1 - before, x_row, listed, length, is_listed, highest, temperature, bin, COUNT=False, LANES=LANES
    )  # fmt: skip
    weight = weigh(value(own_key), highest, temperature)
    return _nth((target - before - above) // weight, own_key, x_row, listed, length, is_listed, LANES)


@triton.jit(do_not_specialize=["num_rows"])  # the batch changes from step to step
def finish_kernel(
    result, saved, entries, lists, plans, logits, rows, modes, bits, maxima, best, totals,
    vocab, stride, num_chunks, num_rows, LANES: tl.constexpr, MAX_CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program per row that is not done: chooses, restores its logits, and takes the raw one for the logprob."""
    row = tl.program_id(0).to(tl.int64)
    mode = tl.load(modes + row)
    if mode != DONE:
        row_words = rows + row * ROW_WORDS
        x_row = logits + row * stride
        highest, token = best_of(maxima, best, row, has_entries(row_words), num_chunks, MAX_CHUNKS)
        if mode == DRAW:
            token = _draw(
                row_words, plans + row * PLAN_WORDS, tl.load(bits + row), x_row, lists + row * LIST_LENGTH,
                highest, vocab, LANES,
            )  # fmt: skip
        tl.store(result + row, token)
        # Where the token has an entry, this reads its logit adjusted or already restored; the saved one replaces it.
        raw = tl.load(x_row + token)
        end = tl.load(row_words + END_ENTRY)
        for start in range(tl.load(row_words + FIRST_ENTRY), end, LANES):
            at = start + tl.arange(0, LANES)
            inside = at < end
            ids = tl.load(entries + at * ENTRY_WORDS, mask=inside, other=0)
            raws = tl.load(saved + at, mask=inside, other=0.0)
            own = inside & (ids == token)
            if tl.max(own.to(tl.int32), axis=0) != 0:
                raw = tl.sum(tl.where(own, raws, 0.0), axis=0)
            tl.store(x_row + ids, raws, mask=inside)
        if tl.load(row_words + NEEDS_LOGPROB) != 0:
            logprob = (raw.to(tl.float64) - log_total(maxima, totals, row, num_chunks, MAX_CHUNKS)).to(tl.float32)
            tl.store(result + num_rows + row, logprob.to(tl.int32, bitcast=True))
