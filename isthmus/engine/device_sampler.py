"""Feeds `kernels.sampler`: requests become rows of parameters on the device, what it sampled becomes tokens.

    stage(sequences, indices)   parameters, without waiting, into memory that stays where it is
    launch(logits)              the kernels; a step's graph comes before them
    collect(sampled, logits)    one copy of all tokens on its way; its results are taken later

Lists of top logprobs are made on the host, from the logits of just the rows that ask for one.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.engine.sampler import with_logprobs
from isthmus.errors import NonFiniteLogits
from isthmus.steps import SamplingInput, StepResult, has_penalty, tokens_that_end
from isthmus.types import Request, Token
from kernels.sampler.parameters import END_FLAG, ENTRY_FIELDS, ROW_FIELDS, SEEN_FLAG
from kernels.sampler.sample import MAX_VOCAB, Sampled, SamplerInputs, sample_logits
from kernels.table import Config

_ROW = np.dtype(list(ROW_FIELDS.items()))
_ENTRY = np.dtype(list(ENTRY_FIELDS.items()))
_MOST_SHIFT = 116  # of top_p: a product of 53 and 58 bits shifted this far is 1, rounded up
_WEIGHT_BITS = 40


@dataclass(slots=True)
class _Parameters:
    """One request's row, without index and slice, and its entries: biased and ending tokens, and what was emitted."""

    request: Request
    vocab_size: int
    row: np.void = field(init=False)
    entries: npt.NDArray = field(init=False)
    num_entries: int = 0
    num_counted: int = 0
    _places: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.row = _row(self.request)
        self.entries = np.zeros(64, _ENTRY)
        for token_id, bias in sampling.logit_bias:
            self._entry(token_id)["bias"] = bias
        if has_penalty(sampling) and sampling.repetition_penalty != 1:
            for token_id in self.request.prompt_token_ids:
                self._entry(token_id)["flags"] |= SEEN_FLAG
        for token_id in self.ends:
            self._entry(token_id)["flags"] |= END_FLAG

    @property
    def ends(self) -> set[int]:
        """What min_tokens forbids; nothing where every token ends, for then the minimum cannot be kept."""
        ends = tokens_that_end(self.request)
        return ends if self.request.sampling.min_tokens and len(ends) < self.vocab_size else set()

    def count(self, token_ids: Sequence[int]) -> None:
        """Takes in what was emitted since the last call."""
        if has_penalty(self.request.sampling):
            for token_id, number in Counter(token_ids[self.num_counted :]).items():
                entry = self._entry(token_id)
                entry["count"] += number
                entry["flags"] |= SEEN_FLAG
        self.num_counted = len(token_ids)

    def needed(self, index: int) -> npt.NDArray:
        """The entries that matter for token `index`."""
        sampling = self.request.sampling
        matters = bool(sampling.logit_bias) or has_penalty(sampling) or index < sampling.min_tokens
        return self.entries[: self.num_entries if matters else 0]

    def _entry(self, token_id: int) -> np.void:
        """A view, valid until the next one is asked for."""
        place = self._places.setdefault(token_id, self.num_entries)
        if place == self.num_entries:
            if place == len(self.entries):
                self.entries = np.concatenate([self.entries, np.zeros_like(self.entries)])
            self.entries["id"][place] = token_id
            self.num_entries += 1
        return self.entries[place]


class PendingTokens:
    """Tokens on their way to the host. Belongs to the step loop; `results` is called once."""

    def __init__(self, packed: Tensor, list_logits: Tensor, indices: Sequence[int], tops: Sequence[int | None]) -> None:
        self._packed = packed
        self._list_logits = list_logits
        self._indices = indices
        self._tops = tops
        self._arrived = torch.cuda.Event() if packed.is_pinned() else None
        if self._arrived is not None:
            self._arrived.record()

    def results(self) -> list[StepResult]:
        """One per row; waits for the copy."""
        if self._arrived is not None:
            self._arrived.synchronize()
        token_ids, logprob_bits, finite = self._packed.numpy()
        logprobs = logprob_bits.view(np.float32).tolist()
        lists = iter(self._list_logits.numpy())
        results: list[StepResult] = []
        for row, (token_id, top) in enumerate(zip(token_ids.tolist(), self._tops, strict=True)):
            logits_V = next(lists) if top else None
            if not finite[row]:
                results.append(NonFiniteLogits(f"token {self._indices[row]}: the model's logits are not finite"))
            elif logits_V is not None:
                results.append(with_logprobs(token_id, logits_V, top))
            else:
                results.append(Token(token_id, None if top is None else logprobs[row]))
        return results


class DeviceSampler:
    """The sampler of one device. Used by one thread, on one stream.

    `num_entries`: room for the tokens that bias, penalties and masks touch, over all rows of a step. A step that needs
    more moves them (`inputs.entries`). `configs`: not the table's.
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: torch.device,
        *,
        num_entries: int = 1 << 16,
        configs: Mapping[str, Config] | None = None,
    ) -> None:
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"the vocabulary is {vocab_size}, the sampler takes {MAX_VOCAB} at most")
        self._vocab_size = vocab_size
        self._configs = configs
        self.inputs = SamplerInputs.allocate(max_rows, num_entries, device)
        self._known: dict[str, _Parameters] = {}
        self._indices: Sequence[int] = ()
        self._tops: Sequence[int | None] = ()

    def stage(self, sequences: Sequence[SamplingInput], indices: Sequence[int] | None = None) -> None:
        """Puts the parameters of the next launch in place, in the order of the current stream; other rows: argmax.

        `indices`: of the tokens to be sampled, where some before them are still pending; else their numbers so far.
        Penalties count `token_ids` as they are. Raises ValueError.
        """
        max_rows = len(self.inputs.rows)
        if len(sequences) > max_rows:
            raise ValueError(f"a step samples {max_rows} rows at most, not {len(sequences)}")
        indices = [len(sequence.token_ids) for sequence in sequences] if indices is None else indices
        rows = np.zeros(max_rows, _ROW)
        slices = list[npt.NDArray]()
        known = dict[str, _Parameters]()
        for row, (sequence, index) in enumerate(zip(sequences, indices, strict=True)):
            parameters = known[sequence.request.request_id] = self._parameters(sequence)
            rows[row] = parameters.row
            rows["forbids_ends"][row] = index < sequence.request.sampling.min_tokens
            slices.append(parameters.needed(index).copy())
        ends = np.cumsum([0, *map(len, slices)])
        num_rows = len(slices)
        num_entries = int(ends[-1])
        if num_entries > len(self.inputs.entries):
            self.inputs = SamplerInputs(
                self.inputs.rows, self.inputs.entries.new_zeros(2 * num_entries, len(ENTRY_FIELDS))
            )
        own = rows[:num_rows]
        own["index"] = indices
        own["first_entry"] = ends[:-1]
        own["end_entry"] = ends[1:]
        self._known = known
        self._indices = indices
        self._tops = [sequence.request.sampling.logprobs for sequence in sequences]
        _copy(rows.view(np.int64).reshape(max_rows, -1), self.inputs.rows)
        if num_entries:
            entries = np.concatenate(slices).view(np.int32)
            _copy(entries.reshape(num_entries, -1), self.inputs.entries[:num_entries])

    def launch(self, logits_BV: Tensor) -> Sampled:
        """Samples the rows of contiguous fp32 logits by what is staged."""
        return sample_logits(logits_BV, self.inputs.first(len(logits_BV)), self._configs)

    def collect(self, sampled: Sampled, logits_BV: Tensor) -> PendingTokens:
        """Starts the copies of what the last staged sequences need; `logits_BV` may change in the stream afterwards."""
        num_rows = len(self._tops)
        wanted = [row for row, top in enumerate(self._tops) if top]
        list_logits = logits_BV[:0]
        if wanted:
            list_logits = logits_BV.index_select(0, _to_device(np.array(wanted), logits_BV.device))
        return PendingTokens(_to_host(sampled.packed[:, :num_rows]), _to_host(list_logits), self._indices, self._tops)

    def sample(self, logits_BV: Tensor, sequences: Sequence[SamplingInput]) -> list[StepResult]:
        """As `isthmus.engine.sampler.sample`."""
        self.stage(sequences)
        return self.collect(self.launch(logits_BV), logits_BV).results()

    def _parameters(self, sequence: SamplingInput) -> _Parameters:
        """Those of the step before with its new tokens, or new ones; a request's tokens are only appended to."""
        known = self._known.get(sequence.request.request_id)
        if known is None or known.request is not sequence.request or known.num_counted > len(sequence.token_ids):
            known = _Parameters(sequence.request, self._vocab_size)
        known.count(sequence.token_ids)
        return known


def _row(request: Request) -> np.void:
    sampling = request.sampling
    row = np.zeros(1, _ROW)[0]
    row["temperature"] = sampling.temperature
    row["top_k"] = max(sampling.top_k, 0)
    row["top_p"], row["top_p_shift"] = _binary(sampling.top_p) if sampling.top_p < 1 else (0, 0)
    numerator, denominator = sampling.min_p.as_integer_ratio()
    row["min_weight"] = -(-(numerator << _WEIGHT_BITS) // denominator)
    row["seed"] = request.seed
    row["needs_logprob"] = sampling.logprobs == 0  # with a list, the host makes all of them
    row["repetition"] = np.float32(sampling.repetition_penalty)
    row["frequency"] = np.float32(sampling.frequency_penalty)
    row["presence"] = np.float32(sampling.presence_penalty)
    return row


def _binary(fraction: float) -> tuple[int, int]:
    """(numerator, shift) of a fraction below 1; one too small to matter becomes another such."""
    numerator, denominator = fraction.as_integer_ratio()
    shift = denominator.bit_length() - 1
    return (numerator, shift) if shift <= _MOST_SHIFT else (1, _MOST_SHIFT)


def _copy(source: npt.NDArray, target: Tensor) -> None:
    staged = torch.from_numpy(source)
    if target.is_cuda:
        staged = staged.pin_memory()  # its memory is not reused before the copy has read it
    target.copy_(staged, non_blocking=True)


def _to_device(array: npt.NDArray, device: torch.device) -> Tensor:
    target = torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device)
    _copy(array, target)
    return target


def _to_host(source: Tensor) -> Tensor:
    target = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    return target.copy_(source, non_blocking=True)
