"""Decode steps as CUDA graphs: one for each bucket of batch sizes, all over the same static inputs.

    pinned words:  token ids | token indices | positions | scales | slots (two words each) | count | block tables
                       |   one asynchronous copy a step
    device words:  sampled tokens of the step before | the same

A row's token is `device words[its index]`: one that was staged, or one that the step before sampled and the host has
not seen. On a CPU nothing is captured; the same steps run eagerly over the same buffers. A step of more rows than the
largest bucket is run in parts: no row's bits depend on the part it is in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isthmus.kv.layout import KvLayout
from isthmus.kv.slots import slots_at
from isthmus.model.triton_layers import Rows
from isthmus.model.triton_model import DecodeInputs, TritonModel
from isthmus.steps import DecodeRow
from kernels.attention_decode.schedule import MAX_ROWS, DecodeScratch

GROUP = 16  # every bucket is a multiple of it
_NUM_STAGES = 3  # pinned buffers: one that is filled, and those whose copies wait behind earlier steps
_WORDS_A_ROW = 6
_COUNT_WORDS = GROUP


def buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that have a graph: 16, 32, 64, … and the largest, rounded up; as many rows as a schedule takes."""
    largest = _whole_groups(min(max_rows, MAX_ROWS))
    doubled = [GROUP << power for power in range(largest.bit_length()) if GROUP << power < largest]
    return (*doubled, largest)


def _whole_groups(num_rows: int) -> int:
    return -(-num_rows // GROUP) * GROUP


@dataclass(frozen=True, slots=True)
class _Stage:
    """A pinned buffer, and what tells that the device has read it."""

    words: Tensor
    view: npt.NDArray[np.int32]
    was_read: torch.cuda.Event | None


class DecodeBuffers:
    """The inputs of every decode step, and where they are staged. Used by one thread."""

    def __init__(self, max_rows: int, layout: KvLayout, query_scale: Tensor, scratch: DecodeScratch) -> None:
        device = query_scale.device
        self.buckets = buckets(max_rows)
        self._rows = rows = self.buckets[-1]
        self._block_size = layout.block_size
        self._max_blocks = layout.num_blocks(query_scale.shape[0])
        self._query_scale = query_scale.cpu().numpy()
        self._scratch = scratch
        self._header = _WORDS_A_ROW * rows + _COUNT_WORDS
        self._first = first = _whole_groups(max_rows)  # of the words that are staged
        num_words = first + self._header + rows * self._max_blocks
        self._device_words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self.sampled = self._device_words[:first]  # by the step before, on the device
        self._tables = torch.zeros(rows, self._max_blocks, dtype=torch.int32, device=device)
        self._stages = cycle([self._stage(device) for _ in range(_NUM_STAGES)])
        self.stage([], self.buckets[-1])

    def _stage(self, device: torch.device) -> _Stage:
        is_cuda = device.type == "cuda"
        words = torch.zeros(self._header + self._rows * self._max_blocks, dtype=torch.int32, pin_memory=is_cuda)
        return _Stage(words, words.numpy(), torch.cuda.Event() if is_cuda else None)

    def bucket_of(self, num_rows: int) -> int:
        """The smallest that holds them."""
        return next(bucket for bucket in self.buckets if bucket >= num_rows)

    @torch.inference_mode()
    def stage(self, rows: Sequence[DecodeRow], bucket: int, sources: Sequence[int] | None = None) -> None:
        """Puts the inputs of the bucket's next step on the device, in the order of the current stream.

        `sources[i]` is the sample of the step before that row i takes as its token, or -1: its own token_id.
        """
        stage = next(self._stages)
        if stage.was_read is not None:
            stage.was_read.synchronize()  # of three steps ago, or never recorded
        width = max((row.position // self._block_size + 1 for row in rows), default=0)
        self._fill(stage.view, rows, sources or [-1] * len(rows), bucket, width)
        num_words = self._header + bucket * width
        staged = self._device_words[self._first : self._first + num_words]
        staged.copy_(stage.words[:num_words], non_blocking=True)
        if stage.was_read is not None:
            stage.was_read.record()
        if width:
            self._tables[:bucket, :width].copy_(staged[self._header :].view(bucket, width))

    def _fill(
        self,
        words: npt.NDArray[np.int32],
        rows: Sequence[DecodeRow],
        sources: Sequence[int],
        bucket: int,
        width: int,
    ) -> None:
        """Rows past the last are padding: token 0 at position -1, stored nowhere."""
        n = len(rows)
        most = self._rows
        header = words[: _WORDS_A_ROW * most].reshape(_WORDS_A_ROW, most)
        token_ids, indices, positions, scales = header[:4]
        slots = header[4:].reshape(-1).view(np.int64)
        own = np.asarray([row.position for row in rows], dtype=np.int32)
        source = np.asarray(sources, dtype=np.int32)
        token_ids[:n] = [row.token_id for row in rows]
        token_ids[n:] = 0
        indices[:] = np.arange(self._first, self._first + most)  # behind the sampled tokens stand the staged ones
        indices[:n] = np.where(source < 0, indices[:n], source)
        positions[:n] = own
        positions[n:] = -1
        scales.view(np.float32)[:n] = self._query_scale[own]
        scales[n:] = 0
        words[self._header - _COUNT_WORDS] = n
        tables = words[self._header : self._header + bucket * width].reshape(bucket, width)
        for table, row in zip(tables, rows, strict=False):
            num_blocks = row.position // self._block_size + 1
            table[:num_blocks] = row.block_table[:num_blocks]
        slots[:n] = slots_at(tables[:n], own[:, None], self._block_size)[:, 0]
        slots[n:] = -1

    def inputs(self, bucket: int) -> DecodeInputs:
        """Of one bucket, made from what is staged; the tokens are looked up where this is called."""
        rows = self._rows
        words = self._device_words
        fields = words[self._first : self._first + _WORDS_A_ROW * rows].view(_WORDS_A_ROW, rows)
        _, indices, positions, scales = fields[:4, :bucket]
        count = self._first + self._header - _COUNT_WORDS
        return DecodeInputs(
            token_ids_B=words[: self._first + rows].index_select(0, indices),
            rows=Rows(
                positions_N=positions,
                slots_N=fields[4:].reshape(-1).view(torch.int64)[:bucket],
                scale_N=scales.view(torch.float32),
                num_real=words[count : count + 1],
            ),
            block_tables=self._tables[:bucket],
            scratch=self._scratch,
        )


class DecodeGraphs:
    """Runs the model's decode step on what is staged: captured once per bucket on CUDA, eagerly elsewhere.

    Used by the one thread that runs steps; `capture` alone adds graphs, before the first step.
    """

    def __init__(self, model: TritonModel, caches: Sequence[Tensor], buffers: DecodeBuffers) -> None:
        self._model = model
        self._caches = caches
        self._buffers = buffers
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def run(self, bucket: int) -> Tensor:
        """Logits [bucket, vocab] in fp32, valid until the next step."""
        if bucket not in self._graphs:
            return self.run_eagerly(bucket)
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits

    @torch.inference_mode()
    def run_eagerly(self, bucket: int) -> Tensor:
        """The same without a graph, with the same bits."""
        return self._model.decode(self._buffers.inputs(bucket), self._caches)

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures every bucket, the largest first: the others then live in its memory. Nothing else may run.

        A step on padding alone precedes each, so that every kernel is compiled and loaded outside the capture.
        """
        pool = torch.cuda.graph_pool_handle()
        for bucket in reversed(self._buffers.buckets):
            self._buffers.stage([], bucket)
            self.run_eagerly(bucket)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits = self.run_eagerly(bucket)
            self._graphs[bucket] = graph, logits
