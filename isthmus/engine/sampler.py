"""Tokens from logits: logit_bias, penalties, mask, temperature, top_k, top_p, min_p, inverse CDF, in this order.

A row's token and logprobs depend on that row and its request alone, bit for bit. So what rounds is computed row by row,
and a probability is an integer, `floor(2^40 * p / p_max)`: sums of those have no order and comparisons no rounding. A
token 2^-40 times as likely as the best one is never drawn; the uniform has 24 bits.
V: vocabulary. Argmax runs where the logits are; everything else on the host.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.engine.philox import UNIFORM_BITS, uniform_bits
from isthmus.errors import NonFiniteLogits
from isthmus.steps import SamplingInput, StepResult, has_penalty, tokens_that_end
from isthmus.types import SamplingParams, Token

_Floats = npt.NDArray[np.float32]
_Integers = npt.NDArray[np.int64]

_WEIGHT_BITS = 40
_ID_BITS = 32


def sample(logits: Tensor, sequences: Sequence[SamplingInput]) -> list[StepResult]:
    """One token per row of fp32 `logits` [num_rows, V]; a row with NaN or infinity gives the error, others do not."""
    assert logits.dtype == torch.float32
    assert logits.shape[0] == len(sequences)
    if not sequences:
        return []
    logits = logits.detach().contiguous()
    best = _argmax(logits)
    bounds = zip(logits.amin(dim=1).tolist(), logits.amax(dim=1).tolist(), strict=True)  # NaN spreads to both
    is_finite = [math.isfinite(low) and math.isfinite(high) for low, high in bounds]
    is_plain = [_is_plain_greedy(sequence) and sequence.request.sampling.logprobs is None for sequence in sequences]
    if all(is_plain) and all(is_finite):
        return [Token(token_id) for token_id in best]
    rows = logits.cpu().numpy()
    results: list[StepResult] = []
    for row, sequence in enumerate(sequences):
        if not is_finite[row]:
            results.append(NonFiniteLogits(f"token {len(sequence.token_ids)}: the model's logits are not finite"))
        else:
            token_id = best[row] if _is_plain_greedy(sequence) else _choose(rows[row], sequence)
            results.append(with_logprobs(token_id, rows[row], sequence.request.sampling.logprobs))
    return results


def _argmax(logits: Tensor) -> list[int]:
    """Of each row; ties to the lower id, which numpy promises and torch.argmax does not."""
    if logits.device.type == "cpu":
        return logits.numpy().argmax(axis=1).tolist()
    return _argmax_on_device(logits)


def _argmax_on_device(logits: Tensor) -> list[int]:
    columns = torch.arange(logits.shape[1], device=logits.device)
    is_best = logits == logits.amax(dim=1, keepdim=True)
    return columns.where(is_best, logits.shape[1]).amin(dim=1).tolist()


def _is_plain_greedy(sequence: SamplingInput) -> bool:
    sampling = sequence.request.sampling
    return (
        sampling.temperature == 0
        and not sampling.logit_bias
        and not has_penalty(sampling)
        and len(sequence.token_ids) >= sampling.min_tokens
    )


def _choose(logits_V: _Floats, sequence: SamplingInput) -> int:
    sampling = sequence.request.sampling
    adjusted_V = _adjusted(logits_V, sequence)
    if sampling.temperature == 0:
        return int(adjusted_V.argmax())
    ids = _descending(adjusted_V)
    ordered = adjusted_V[ids]
    if 0 < sampling.top_k < len(ordered):
        ordered = ordered[ordered >= ordered[sampling.top_k - 1]]  # all ties kept
    weights = _weights(ordered, sampling.temperature)
    return int(ids[_draw(weights, sampling, uniform_bits(sequence.request.seed, len(sequence.token_ids)))])


def _adjusted(logits_V: _Floats, sequence: SamplingInput) -> _Floats:
    """With bias and penalties, and minus infinity where min_tokens forbids an end; in fp32."""
    sampling = sequence.request.sampling
    adjusted_V = logits_V.copy()
    if sampling.logit_bias:
        ids, values = zip(*sampling.logit_bias, strict=True)
        adjusted_V[list(ids)] += np.array(values, dtype=np.float32)
    if has_penalty(sampling):
        _penalise(adjusted_V, sequence)
    if len(sequence.token_ids) < sampling.min_tokens:
        ends = tokens_that_end(sequence.request)
        if len(ends) < len(adjusted_V):  # where every token ends, the minimum cannot be kept
            adjusted_V[list(ends)] = -np.inf
    return adjusted_V


def _penalise(adjusted_V: _Floats, sequence: SamplingInput) -> None:
    """Repetition counts prompt and output; frequency and presence count output. In place; stays finite."""
    sampling = sequence.request.sampling
    counts = Counter(sequence.token_ids)
    limits = np.finfo(np.float32)
    with np.errstate(over="ignore"):
        if sampling.repetition_penalty != 1:
            seen = list(counts.keys() | set(sequence.request.prompt_token_ids))
            values = adjusted_V[seen]
            penalty = np.float32(sampling.repetition_penalty)
            adjusted_V[seen] = np.where(values > 0, values / penalty, values * penalty).clip(limits.min, limits.max)
        if counts:
            repeats = np.array(list(counts.values()), dtype=np.float32)
            penalties = repeats * np.float32(sampling.frequency_penalty) + np.float32(sampling.presence_penalty)
            adjusted_V[list(counts)] -= penalties
    adjusted_V.clip(limits.min, limits.max, out=adjusted_V)


def _descending(values_V: _Floats) -> _Integers:
    """All ids by descending value, then id: one sort of integers that hold both, far faster than a stable sort."""
    bits = (0 - values_V).view(np.int32)  # 0 - x: never -0.0, which would sort apart from 0.0
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64) << _ID_BITS
    keys |= np.arange(len(values_V))
    keys.sort()
    return keys & ((1 << _ID_BITS) - 1)


def _weights(ordered: _Floats, temperature: float) -> _Integers:
    """floor(2^40 * p / p_max) of logits in descending order: the first has 2^40 whatever the temperature."""
    with np.errstate(over="ignore"):
        scaled = (ordered.astype(np.float64) - float(ordered[0])) / temperature
    return (np.exp(scaled) * (1 << _WEIGHT_BITS)).astype(np.int64)


def _draw(weights: _Integers, sampling: SamplingParams, bits: int) -> int:
    """top_p, min_p, and where the cumulated weight first passes `bits / 2^24` of what is kept."""
    cumulated = weights.cumsum()
    num_kept = len(weights)
    if sampling.top_p < 1:
        num_kept = int(cumulated.searchsorted(max(1, _share(sampling.top_p, int(cumulated[-1]))))) + 1
    if sampling.min_p > 0:
        num_kept = min(num_kept, int((weights >= _share(sampling.min_p, 1 << _WEIGHT_BITS)).sum()))
    drawn = bits * int(cumulated[num_kept - 1]) >> UNIFORM_BITS
    return int(cumulated.searchsorted(drawn, side="right"))


def _share(fraction: float, total: int) -> int:
    """The least integer that is at least `fraction * total`, exactly."""
    numerator, denominator = fraction.as_integer_ratio()
    return -(-numerator * total // denominator)


def with_logprobs(token_id: int, logits_V: _Floats, top: int | None) -> Token:
    """Of the raw logits, rounded to fp32; the top ones by descending logit, then id."""
    if top is None:
        return Token(token_id)
    ids = [token_id, *(_descending(logits_V)[:top].tolist() if top else [])]
    wide_V = logits_V.astype(np.float64)
    highest = wide_V.max()
    logprobs = wide_V[ids] - (highest + np.log(np.exp(wide_V - highest).sum()))
    own, *others = logprobs.astype(np.float32).tolist()
    return Token(token_id, own, tuple(zip(ids[1:], others, strict=True)))
