"""Opening an engine from a worker's settings, and what a worker says of it in GetStatus and in its lease."""

from collections.abc import Callable

import torch

from isthmus.checkpoint.directory import Checkpoint
from isthmus.config import WorkerConfig
from isthmus.convert import block_counts_to_proto, layout_to_proto
from isthmus.engine.device_memory import DeviceMemory
from isthmus.engine.engine import USUAL_LIMITS, Engine, require_room
from isthmus.errors import CannotStart
from isthmus.kv.planes import kv_layout, stored_as
from isthmus.steps import StepLimits
from isthmus.types import Place
from isthmus.v1 import admin_pb2

CPU_CACHE_BYTES = 256 << 20


def open_engine(config: WorkerConfig, tell: Callable[[str], None], limits: StepLimits = USUAL_LIMITS) -> Engine:
    """Loads the checkpoint and runs the canary, telling how far it is. Raises CannotStart naming the setting."""
    checkpoint = Checkpoint.open(config.model, config.context_length)
    num_blocks = _num_blocks(config, checkpoint)
    try:
        return Engine.open(
            checkpoint,
            dtype=config.dtype,
            device=config.device,
            cache_dtype=config.cache_dtype,
            block_size=config.block_size,
            num_blocks=num_blocks,
            limits=limits,
            progress=lambda done, total: tell(f"weights loaded: {done >> 20:,} of {total >> 20:,} MiB"),
        )
    except torch.cuda.OutOfMemoryError as error:
        problem = f"weights, cache and steps do not fit the GPU: {error}"
        raise CannotStart("device", problem, "set --cache-bytes or --num-blocks lower, or use a larger GPU") from error


def _num_blocks(config: WorkerConfig, checkpoint: Checkpoint) -> int | None:
    """As the settings say; None: as many as the GPU has room for."""
    cache_bytes = config.cache_bytes
    if cache_bytes is None and config.device == "cpu":
        cache_bytes = CPU_CACHE_BYTES
    num_blocks = config.num_blocks
    dtype = stored_as(config.dtype, config.cache_dtype, config.device)
    layout = kv_layout(checkpoint.config, "", dtype=dtype, block_size=config.block_size)
    if num_blocks is None and cache_bytes is not None:
        num_blocks = cache_bytes // layout.block_bytes
    if num_blocks is not None:
        require_room(num_blocks, layout, checkpoint.config.context_length)
    return num_blocks


def engine_status(model: str, engine: Engine | None) -> admin_pb2.GetStatusResponse:
    """The engine's part of a status; before it is open, the model's name alone."""
    if engine is None:
        return admin_pb2.GetStatusResponse(model=model)
    return admin_pb2.GetStatusResponse(
        model=model,
        device=str(engine.device),
        dtype=engine.dtype,
        layout=layout_to_proto(engine.layout),
        numerics_digest=engine.numerics_digest,
        numerics_ingredients=engine.numerics.ingredients,
        blocks=block_counts_to_proto(engine.pool.counts()),
    )


def device_memory(engine: Engine) -> DeviceMemory | None:
    """What the transfer path takes where the cache is on a GPU; None: its bytes are this process's."""
    if engine.device.type == "cpu":
        return None
    if engine.runner.kernels == "torch":
        return DeviceMemory(engine.cache)
    from kernels.latents.transfer import gather_rows, scatter_rows

    return DeviceMemory(engine.cache, gather=gather_rows, scatter=scatter_rows)


def transfer_memory(engine: Engine) -> dict[Place, memoryview]:
    """Writable bytes of a cache in this process's memory by (plane, layer), as the transfer path takes them."""
    return {place: engine.cache.memory(*place) for place in engine.layout.places}
