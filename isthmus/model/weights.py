"""Reads tensors of mapped safetensors files into fresh memory of the target dtype and device, a stretch at a time."""

import threading
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint, TensorEntry
from isthmus.errors import CannotStart
from isthmus.model.linear import ExpertStack, Fp8ExpertStack, Fp8Linear, Linear
from kernels.experts.definition import Matrices
from kernels.products.definition import FP8_BLOCK, dequantise

_STRETCH_ELEMENTS = 1 << 22  # converted at once: bounds what a load needs beside the weights themselves

Progress = Callable[[int, int], None]  # bytes of the checkpoint loaded, bytes in all


class Part(NamedTuple):
    """Rows of a joined matrix: a stored one by its name without `.weight`, its row i going to places[i]."""

    name: str
    places: Tensor | None = None  # None: in order


@dataclass
class Weights:
    """Open weight files. Any thread may read; closing the context ends the mappings, never what was read."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    device: torch.device
    progress: Progress
    keeps_fp8: bool
    left_out: Container[str]  # tensors that nobody will read; `progress` counts without them

    def __post_init__(self) -> None:
        self.entries: Mapping[str, TensorEntry] = self.checkpoint.tensors
        self._lock = threading.Lock()
        self._done = 0
        self._total = sum(entry.num_bytes for name, entry in self.entries.items() if name not in self.left_out)
        self._files: dict[str, safe_open] = {}

    def __enter__(self) -> "Weights":
        for file in self.checkpoint.weight_files:
            try:
                self._files[file.name] = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CannotStart("model", f"{file} cannot be read: {error}", "fetch the file again") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A vector or table as stored, in `dtype` (None: the model's)."""
        stored = self._stored(name)
        out = torch.empty(stored.shape, dtype=dtype or self.dtype, device=self.device).copy_(stored)
        self._count(name)
        return out

    def plain(self, *parts: Part) -> Tensor:
        """[out, in] of all parts, the first part's outputs first; dequantised in any case."""
        out = torch.empty(self._shape(parts), dtype=self.dtype, device=self.device)
        self._join(parts, out, None)
        return out

    def linear(self, *parts: Part) -> Linear | Fp8Linear:
        """One matrix of all parts."""
        bias = self._bias(parts)
        if not self._stay_fp8(parts):
            return Linear(self.plain(*parts).t(), bias)
        stacked = self._fp8_stack([parts])
        return Fp8Linear(stacked.weight[0], stacked.scales[0], self.dtype, bias)

    def stack(self, matrices: Sequence[Sequence[Part]]) -> Matrices:
        """The matrices in one block of memory."""
        if self._stay_fp8(matrices[0]):
            return self._fp8_stack(matrices)
        out = torch.empty(len(matrices), *self._shape(matrices[0]), dtype=self.dtype, device=self.device)
        for parts, matrix in zip(matrices, out, strict=True):
            self._join(parts, matrix, None)
        return ExpertStack(out)

    def fused_stack(self, name: str) -> ExpertStack:
        """The matrices of a stored tensor [matrices, out, in], in one block of memory."""
        return ExpertStack(self.tensor(name))

    def _stay_fp8(self, parts: Sequence[Part]) -> bool:
        return self.keeps_fp8 and all(f"{part.name}.weight_scale_inv" in self.entries for part in parts)

    def _shape(self, parts: Sequence[Part]) -> tuple[int, int]:
        shapes = [self.entries[f"{part.name}.weight"].shape for part in parts]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def _fp8_stack(self, matrices: Sequence[Sequence[Part]]) -> Fp8ExpertStack:
        rows, columns = self._shape(matrices[0])
        weight = torch.empty(len(matrices), rows, columns, dtype=torch.float8_e4m3fn, device=self.device)
        scales = torch.empty(len(matrices), rows, -(-columns // FP8_BLOCK), device=self.device)
        for index, parts in enumerate(matrices):
            self._join(parts, weight[index], scales[index])
        return Fp8ExpertStack(weight, scales, self.dtype)

    def _join(self, parts: Sequence[Part], out: Tensor, scales: Tensor | None) -> None:
        first = 0
        for part in parts:
            rows = slice(first, first + self.entries[f"{part.name}.weight"].shape[0])
            self._place(part, out[rows], None if scales is None else scales[rows])
            first = rows.stop

    def _place(self, part: Part, out: Tensor, scales: Tensor | None) -> None:
        stored = self._stored(f"{part.name}.weight")
        of_rows = self._scales_of_rows(part.name)
        step = max(1, _STRETCH_ELEMENTS // stored.shape[1])
        for first in range(0, stored.shape[0], step):
            rows = slice(first, min(first + step, stored.shape[0]))
            values = stored[rows]
            if scales is not None and of_rows is not None:
                _copy(of_rows[rows], scales, rows, part.places)
                _copy(values.view(torch.uint8), out.view(torch.uint8), rows, part.places)
            elif of_rows is not None:
                _copy(dequantise(values, of_rows[rows], out.dtype), out, rows, part.places)
            else:
                _copy(values, out, rows, part.places)
        self._count(f"{part.name}.weight", f"{part.name}.weight_scale_inv", f"{part.name}.bias")

    def _scales_of_rows(self, name: str) -> Tensor | None:
        """A row of scales for each row of the matrix; None where it is not FP8."""
        if f"{name}.weight_scale_inv" not in self.entries:
            return None
        scales = self._stored(f"{name}.weight_scale_inv").float()
        return scales.repeat_interleave(FP8_BLOCK, dim=0)[: self.entries[f"{name}.weight"].shape[0]]

    def _bias(self, parts: Sequence[Part]) -> Tensor | None:
        """Zeros where a part has none; None where no part has one."""
        if not any(f"{part.name}.bias" in self.entries for part in parts):
            return None
        biases: list[Tensor] = []
        for part in parts:
            rows = self.entries[f"{part.name}.weight"].shape[0]
            bias = torch.zeros(rows, dtype=self.dtype, device=self.device)
            if f"{part.name}.bias" in self.entries:
                _copy(self._stored(f"{part.name}.bias"), bias, slice(0, rows), part.places)
            biases.append(bias)
        return torch.cat(biases)

    def _stored(self, name: str) -> Tensor:
        return self._files[self.entries[name].file.name].get_tensor(name)

    def _count(self, *names: str) -> None:
        with self._lock:
            self._done += sum(self.entries[name].num_bytes for name in names if name in self.entries)
            self.progress(self._done, self._total)


def _copy(values: Tensor, out: Tensor, rows: slice, places: Tensor | None) -> None:
    """To `rows` of `out`, or to their places."""
    if places is None:
        out[rows].copy_(values)
    else:
        out.index_copy_(0, places[rows].to(out.device), values.to(out.device, out.dtype))
