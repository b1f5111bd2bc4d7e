"""Runs steps over the kernels: prefill as launched, decode through graphs. What `isthmus.engine.runner` promises holds.

Inputs leave through pinned memory and logits stay where they are. A decode step does not wait for the device; a prefill
step does at its end, so that who times, counts or cancels steps knows where the device is.
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

import kernels
from isthmus.engine.decode_graphs import DecodeBuffers, DecodeGraphs, buckets
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.runner import check_chunks, check_rows
from isthmus.kv.planes import LATENT
from isthmus.kv.slots import slots_at
from isthmus.model import Model
from isthmus.model.triton_layers import Rows
from isthmus.model.triton_model import PrefillInputs, TritonModel
from isthmus.steps import DecodeRow, OnStored, PrefillChunk, ignore_stored
from kernels.attention_decode.schedule import DecodeScratch
from kernels.attention_prefill.plan import SEGMENT_TOKENS, PrefillPlan
from kernels.table import architecture_of


class TritonRunner:
    """Used by one thread at a time. Decode steps of up to `max_rows` rows are foreseen; graphs are captured on CUDA.

    Raises UnsupportedKernel where the table lacks a variant that this model on this device needs.
    """

    def __init__(self, model: Model, cache: LatentCache, max_rows: int) -> None:
        self.model = model
        self.cache = cache
        self.kernels = kernels_name(model.device)
        self._triton = TritonModel(model)
        self._caches = cache.layers[LATENT]
        config = model.config
        scratch = DecodeScratch.allocate(
            buckets(max_rows)[-1], config.num_heads, config.kv_lora_rank, config.context_length, model.device
        )
        self.buffers = DecodeBuffers(max_rows, cache.layout, model.tables.query_scale, scratch)
        self._query_scale = model.tables.query_scale.cpu().numpy()
        self.graphs = DecodeGraphs(self._triton, self._caches, self.buffers)
        self._warm_up()

    def _warm_up(self) -> None:
        """Compiles what steps launch, in block 0, which nobody has yet, and captures."""
        self.prefill([PrefillChunk((0,), 0, (0,), needs_logits=True)])
        if self.model.device.type != "cuda":
            self.graphs.run(self.buffers.buckets[0])
            return
        # A context of several segments: other arguments, hence another compilation.
        start = min(self.model.config.context_length - 1, 2 * SEGMENT_TOKENS)
        table = [0] * self.cache.layout.num_blocks(start + 1)
        self.prefill([PrefillChunk((0,), start, table, needs_logits=False)])
        self.graphs.capture()

    def prefill(self, chunks: Sequence[PrefillChunk], on_stored: OnStored = ignore_stored) -> Tensor:
        """As `StepRunner` says; `on_stored` follows the launch of what stores a layer's latents."""
        check_chunks(chunks, self.model.config, self.cache.layout)
        logits = self._prefill(chunks, on_stored)
        if logits.is_cuda:
            torch.cuda.current_stream(logits.device).synchronize()
        return logits

    def decode(self, rows: Sequence[DecodeRow], on_stored: OnStored = ignore_stored) -> Tensor:
        """As `StepRunner` says; `on_stored` follows the launch of all layers."""
        check_rows(rows, self.model.config, self.cache.layout)
        logits = [self.launch(rows[part])[: part.stop - part.start].clone() for part in self.parts(len(rows))]
        for layer in range(self.model.config.num_layers):
            on_stored(LATENT, layer)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def parts(self, num_rows: int) -> list[slice]:
        """Of a step, each for one launch, in this order: a row of a sequence follows those of earlier positions."""
        most = self.buffers.buckets[-1]
        return [slice(first, min(first + most, num_rows)) for first in range(0, num_rows, most)]

    def launch(self, rows: Sequence[DecodeRow], sources: Sequence[int] | None = None) -> Tensor:
        """Logits [bucket, vocab] in fp32 of checked rows: theirs first, then padding's; valid until the next launch.

        `sources[i]`: the index in `buffers.sampled` that row i takes as its token; -1: its own token_id.
        """
        bucket = self.buffers.bucket_of(len(rows))
        self.buffers.stage(rows, bucket, sources)
        return self.graphs.run(bucket)

    @torch.inference_mode()
    def _prefill(self, chunks: Sequence[PrefillChunk], on_stored: OnStored) -> Tensor:
        return self._triton.prefill(self._prefill_inputs(chunks), self._caches, on_stored)

    def _prefill_inputs(self, chunks: Sequence[PrefillChunk]) -> PrefillInputs:
        """Rows of all chunks one after the other."""
        block_size = self.cache.layout.block_size
        device = self.model.device
        positions_of = [np.arange(chunk.start, chunk.end) for chunk in chunks]
        positions = np.concatenate(positions_of)
        slots = [
            slots_at(np.asarray(chunk.block_table), own, block_size)
            for chunk, own in zip(chunks, positions_of, strict=True)
        ]
        ends = np.cumsum([len(chunk.token_ids) for chunk in chunks])
        logit_rows = [int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.needs_logits]
        plan = [(chunk.start, len(chunk.token_ids), chunk.block_table) for chunk in chunks]
        return PrefillInputs(
            token_ids_N=self._put(np.concatenate([np.asarray(chunk.token_ids, dtype=np.int32) for chunk in chunks])),
            rows=Rows(
                positions_N=self._put(positions.astype(np.int32)),
                slots_N=self._put(np.concatenate(slots)),
                scale_N=self._put(self._query_scale[positions]),
                num_real=None,
            ),
            plan=PrefillPlan.build(plan, block_size, device),
            logit_rows=self._put(np.asarray(logit_rows, dtype=np.int64)),
        )

    def _put(self, array: npt.NDArray) -> Tensor:
        return to_device(torch.from_numpy(array), self.model.device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)


@cache
def kernels_name(device: torch.device) -> str:
    """`triton`, its version, the architecture, and a digest of the kernels' sources and their table."""
    folder = Path(kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.glob("tuned/*.json")]):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return f"triton {triton.__version__} {architecture_of(device)} {digest.hexdigest()[:16]}"
