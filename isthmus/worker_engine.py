"""Opening an engine from a worker's settings, and what a worker says of it in GetStatus and in its lease."""

import time
from typing import Final

from tqdm import tqdm

from isthmus.checkpoint import Checkpoint
from isthmus.config import WorkerConfig
from isthmus.convert import block_counts_to_proto, layout_to_proto
from isthmus.engine.engine import Engine
from isthmus.errors import CannotStart
from isthmus.log import get_logger
from isthmus.v1 import admin_pb2

_LOG_EVERY_S: Final = 2.0

_log = get_logger("engine")


def open_engine(config: WorkerConfig) -> Engine:
    """Loads the checkpoint and runs the canary. Raises CannotStart naming the setting."""
    if config.device == "cuda":  # the engine runs there; blocks in GPU memory cannot be sent or received yet
        raise CannotStart("device", "blocks in GPU memory cannot be transferred yet", "set --device cpu")
    engine = _open(config)
    num_positions = engine.pool.counts().total * config.block_size
    if num_positions < engine.context_length:
        problem = f"the cache holds {num_positions} positions, one request may need {engine.context_length}"
        raise CannotStart("cache_bytes", problem, "set --cache-bytes higher or --context-length lower")
    return engine


def _open(config: WorkerConfig) -> Engine:
    """A load of over two seconds shows a bar on a terminal, else a line in the log now and then."""
    checkpoint = Checkpoint.open(config.model, config.context_length)
    with tqdm(desc="loading weights", unit="B", unit_scale=True, delay=2.0, disable=None) as bar:
        next_line_s = time.monotonic() + _LOG_EVERY_S

        def show(done: int, total: int) -> None:
            nonlocal next_line_s
            bar.total = total
            bar.update(done - bar.n)
            if bar.disable and time.monotonic() > next_line_s:
                next_line_s += _LOG_EVERY_S
                _log.info("weights.loading", mib=done >> 20, of_mib=total >> 20)

        return Engine.open(
            checkpoint,
            dtype=config.dtype,
            device=config.device,
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            cache_bytes=config.cache_bytes,
            progress=show,
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
    places = [(index, layer) for index, plane in enumerate(engine.layout.planes) for layer in range(plane.num_layers)]
    return {place: engine.cache.memory(*place) for place in places}
