"""The device sampler: microseconds a step takes for it, by what is asked of it, at V2-Lite's vocabulary."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_timing import Ceilings, Report, Timer
from kernels.sampler.parameters import ROW_FIELDS, SamplerInputs
from kernels.sampler.sample import Sampled, sample_logits

VOCAB = 102400
ROWS = (1, 32, 128)


def top_p(share: float) -> dict[str, int]:
    numerator, denominator = share.as_integer_ratio()
    return {"top_p": numerator, "top_p_shift": denominator.bit_length() - 1}


MODES: dict[str, dict[str, Any]] = {
    "argmax": {},
    "argmax, logprob": {"needs_logprob": 1},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top_p 0.95": {"temperature": 1.0, **top_p(0.95)},
    "temperature 0.8, top_k 50, top_p 0.9, logprob": {
        "temperature": 0.8,
        "top_k": 50,
        "needs_logprob": 1,
        **top_p(0.9),
    },
    "temperature 1, min_p 0.05": {"temperature": 1.0, "min_weight": int(0.05 * (1 << 40))},
}


def parameters(mode: dict[str, Any], rows: int, device: torch.device) -> SamplerInputs:
    """The same for every row, each with its own seed."""
    inputs = SamplerInputs.allocate(rows, 1, device)
    words = np.zeros((rows, len(ROW_FIELDS)), dtype=np.int64)
    for column, (name, kind) in enumerate(ROW_FIELDS.items()):
        default = {"repetition": 1.0}.get(name, 0)
        words[:, column].view(kind)[:] = np.arange(rows) if name == "seed" else mode.get(name, default)
    inputs.rows.copy_(torch.from_numpy(words))
    return inputs


def sample_rotation(logits_RBV: Tensor, inputs: SamplerInputs, rotation: int) -> Sampled:
    return sample_logits(logits_RBV[rotation], inputs)


def table(ceilings: Ceilings, report: Report, timer: Timer) -> None:
    """Logits are normal with deviation 3: the likeliest token of some has a few per cent."""
    vocab = VOCAB
    counts = ROWS
    modes = MODES
    if timer.is_dry:
        vocab = 600
        counts = (1,)
        modes = dict(list(MODES.items())[:5:4])
    rows = []
    for count in counts:
        num_bytes = 4 * count * vocab
        rotations = timer.rotations(num_bytes)
        logits = torch.randn(rotations, count, vocab, device=timer.device) * 3
        for name, mode in modes.items():
            inputs = parameters(mode, count, timer.device)
            taken = timer.compare({name: partial(sample_rotation, logits, inputs)}, rotations)
            if name not in taken:
                continue
            assert sample_logits(logits[0], inputs).finite.all(), "every row samples"
            seconds = taken[name].median
            floor = num_bytes / ceilings.read_bytes_per_s
            rows.append([name, f"{count}", f"{seconds * 1e6:.1f}", f"{floor * 1e6:.1f}"])
    note = f"The sampler, {vocab:,} logits a row, cold; floor: every logit read once."
    report.table(("sampler", "rows", "us", "floor us"), rows, note)
