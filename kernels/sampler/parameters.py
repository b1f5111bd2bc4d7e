"""How sampling parameters lie on the device, and what the sampler's kernels share.

A row's parameters are 14 words of 64 bits; a token that its bias, penalties or min_tokens touch is an entry of four
words of 32. All zero is a row of plain argmax, without entries and without a logprob.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

# Column -> type in numpy's letters; `isthmus/engine/device_sampler.py` fills them in.
ROW_FIELDS = {
    "temperature": "f8",  # 0: argmax of the adjusted logits
    "top_k": "i8",  # 0: off
    "top_p": "i8",  # top_p is exactly top_p / 2^top_p_shift
    "top_p_shift": "i8",  # 0: off, else at most 116
    "min_weight": "i8",  # ceil(min_p * 2^40)
    "seed": "u8",
    "index": "i8",  # of the token
    "needs_logprob": "i8",
    "repetition": "f8",  # the three penalties hold fp32 values
    "frequency": "f8",
    "presence": "f8",
    "first_entry": "i8",
    "end_entry": "i8",
    "forbids_ends": "i8",  # 1: entries flagged as ends cannot be chosen
}
ENTRY_FIELDS = {"id": "i4", "bias": "f4", "count": "i4", "flags": "i4"}  # count: occurrences in the output
SEEN_FLAG = 1  # the token is in the prompt or output
END_FLAG = 2  # it ends the request

ROW_WORDS = tl.constexpr(len(ROW_FIELDS))
ENTRY_WORDS = tl.constexpr(len(ENTRY_FIELDS))
(
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TOP_P_SHIFT,
    MIN_WEIGHT,
    SEED,
    INDEX,
    NEEDS_LOGPROB,
    REPETITION,
    FREQUENCY,
    PRESENCE,
    FIRST_ENTRY,
    END_ENTRY,
    FORBIDS_ENDS,
) = (tl.constexpr(column) for column in range(len(ROW_FIELDS)))

# What is left to do for a row after its raw logits were looked at.
DONE = tl.constexpr(0)
ADJUSTED_ARGMAX = tl.constexpr(1)
DRAW = tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """The parameters of B rows: `rows` [B, 14] int64 by ROW_FIELDS, `entries` [E, 4] int32 by ENTRY_FIELDS.

    E is a capacity: what lies outside every row's slice is not read. An id stands at most once in a row's slice.
    """

    rows: Tensor
    entries: Tensor

    @classmethod
    def allocate(cls, max_rows: int, max_entries: int, device: torch.device) -> Self:
        """Rows of plain argmax."""
        rows = torch.zeros(max_rows, len(ROW_FIELDS), dtype=torch.int64, device=device)
        return cls(rows, torch.zeros(max_entries, len(ENTRY_FIELDS), dtype=torch.int32, device=device))

    def first(self, num_rows: int) -> "SamplerInputs":
        """Of the first rows; a view."""
        return SamplerInputs(self.rows[:num_rows], self.entries)


@triton.jit
def load_float(row_words, column):
    return tl.load(row_words + column).to(tl.float64, bitcast=True)


@triton.jit
def has_entries(row_words):
    return (tl.load(row_words + FIRST_ENTRY) < tl.load(row_words + END_ENTRY)).to(tl.int32)


@triton.jit
def best_of(maxima, best, row, stage, num_chunks, MAX_CHUNKS: tl.constexpr):
    """Highest logit of a row and the lowest id that has it, from its chunks; stage 0: raw, 1: adjusted."""
    chunk = tl.arange(0, MAX_CHUNKS)
    at = (row * 2 + stage) * num_chunks + chunk
    highs = tl.load(maxima + at, mask=chunk < num_chunks, other=float("-inf"))
    ids = tl.load(best + at, mask=chunk < num_chunks, other=0x7FFFFFFF)
    highest = tl.max(highs, axis=0)
    return highest, tl.min(tl.where(highs == highest, ids, 0x7FFFFFFF), axis=0)


@triton.jit
def log_total(maxima, totals, row, num_chunks, MAX_CHUNKS: tl.constexpr):
    """log sum exp of a row's raw logits in fp64; chunks are folded in one fixed order."""
    chunk = tl.arange(0, MAX_CHUNKS)
    inside = chunk < num_chunks
    highs = tl.load(maxima + row * 2 * num_chunks + chunk, mask=inside, other=float("-inf")).to(tl.float64)
    sums = tl.load(totals + row * num_chunks + chunk, mask=inside, other=0.0)
    highest = tl.max(highs, axis=0)
    return highest + tl.log(tl.sum(tl.exp(highs - highest) * sums, axis=0))
