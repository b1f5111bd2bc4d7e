"""Opening an engine from a worker's settings, and what a worker says of it in GetStatus and in its lease."""

from collections.abc import Callable

from isthmus.checkpoint import Checkpoint
from isthmus.config import WorkerConfig
from isthmus.convert import block_counts_to_proto, layout_to_proto
from isthmus.engine.engine import Engine, kv_layout
from isthmus.errors import CannotStart
from isthmus.v1 import admin_pb2


def open_engine(config: WorkerConfig, tell: Callable[[str], None]) -> Engine:
    """Loads the checkpoint and runs the canary, telling how far it is. Raises CannotStart naming the setting."""
    if config.device == "cuda":  # the engine runs there; blocks in GPU memory cannot be sent or received yet
        raise CannotStart("device", "blocks in GPU memory cannot be transferred yet", "set --device cpu")
    checkpoint = Checkpoint.open(config.model, config.context_length)
    layout = kv_layout(checkpoint.config, "", dtype=config.dtype, block_size=config.block_size)
    num_blocks = config.num_blocks or config.cache_bytes // layout.block_bytes
    num_positions = num_blocks * config.block_size
    if num_positions < checkpoint.config.context_length:
        problem = f"the cache holds {num_positions} positions, one request may need {checkpoint.config.context_length}"
        raise CannotStart("cache_bytes", problem, "set --num-blocks or --cache-bytes higher, or --context-length lower")
    return Engine.open(
        checkpoint,
        dtype=config.dtype,
        device=config.device,
        block_size=config.block_size,
        num_blocks=num_blocks,
        progress=lambda done, total: tell(f"weights loaded: {done >> 20:,} of {total >> 20:,} MiB"),
    )


def engine_status(model: str, engine: Engine | None) -> admin_pb2.GetStatusResponse:
    """The engine's part of a status; before it is open, the model's name alone."""
    if engine is None:
        return admin_pb2.GetStatusResponse(model=model)
    return admin_pb2.GetStatusResponse(
        model=model,
        device=str(engine.device),
        dtype=engine.dtype,
        layout=layout_to_proto(engine.layout),
        numerics_digest=engine.numerics.digest,
        numerics_ingredients=engine.numerics.ingredients,
        blocks=block_counts_to_proto(engine.pool.counts()),
    )


def transfer_memory(engine: Engine) -> dict[tuple[int, int], memoryview]:
    """Writable bytes of the cache by (plane, layer), as the transfer path takes them."""
    return {place: engine.cache.memory(*place) for place in engine.layout.places}
