"""How many blocks a GPU holds: the largest steps run once on a cache of one block; what they leave is for blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from isthmus.checkpoint.model_config import ModelConfig
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.runner import StepRunner
from isthmus.errors import CannotStart
from isthmus.kv.layout import KvLayout
from isthmus.steps import DecodeRow, OnStored, PrefillChunk

FRACTION = 0.92  # of what is free beside the weights; the rest is for transfers, other libraries and fragmentation


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Bytes of a GPU with the weights in place."""

    free: int  # before there was a runner
    runner: int  # what it keeps: compiled kernels, graphs, inputs
    prefill_peak: int  # of the largest steps, beyond that
    decode_peak: int

    def num_blocks(self, block_bytes: int) -> int:
        """Blocks that fit beside the steps; 0 if there is no room."""
        room = int(self.free * FRACTION) - self.runner - max(self.prefill_peak, self.decode_peak)
        return max(0, room // block_bytes)


def profile_steps(
    config: ModelConfig,
    layout: KvLayout,
    open_on: Callable[[LatentCache], StepRunner],
    *,
    decode_rows: int,
    prefill_tokens: int,
) -> MemoryProfile:
    """Opens a runner on a cache of one block and runs its largest steps at the end of the context.

    Every block of their tables is that one, so what they compute has no meaning. Raises CannotStart when they do not
    fit beside the weights.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    free = _free_bytes(device)
    try:
        runner = open_on(LatentCache(layout, 1, device))
        held = free - _free_bytes(device)
        rows = [DecodeRow(0, config.context_length - 1, _whole_table(config, layout))] * decode_rows
        decode_peak = _peak(partial(runner.decode, rows), device)
        prefill_peak = _peak(partial(_prefill, runner, config, layout, prefill_tokens), device)
    except torch.cuda.OutOfMemoryError as error:
        problem = f"the largest steps do not fit beside the weights: {error}"
        raise CannotStart("device", problem, "set --context-length, --max-batch or --tile-budget lower") from error
    return MemoryProfile(free, held, prefill_peak, decode_peak)


def _whole_table(config: ModelConfig, layout: KvLayout) -> list[int]:
    return [0] * layout.num_blocks(config.context_length)


class _Seen(Exception):
    """The layers that follow need what those before needed."""


def _prefill(runner: StepRunner, config: ModelConfig, layout: KvLayout, num_tokens: int) -> None:
    """The last tokens of as many contexts as it takes, up to the first layer that follows one of each kind."""
    num_whole, rest = divmod(num_tokens, config.context_length)
    lengths = [config.context_length] * num_whole + [rest] * (rest > 0)
    table = _whole_table(config, layout)
    chunks = [PrefillChunk([0] * n, config.context_length - n, table, needs_logits=True) for n in lengths]
    enough = 1 + (config.sparse_layers.index(True) if any(config.sparse_layers) else 0)
    try:
        runner.prefill(chunks, _stop_after(enough))
    except _Seen:
        return


def _stop_after(enough: int) -> OnStored:
    def on_stored(_plane: str, layer: int) -> None:
        if layer >= enough:
            raise _Seen

    return on_stored


def _peak(step: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch took from the device for `step`, beyond what it had before."""
    _free_bytes(device)
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - before


def _free_bytes(device: torch.device) -> int:
    """What the device has free once torch has given back what it keeps for later."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
