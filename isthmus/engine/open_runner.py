"""Which runner serves: the kernels where they can, plain torch elsewhere. Triton is imported only where it is used."""

from functools import cache as once

import torch

from isthmus.engine.decoding import HostDecoder
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.runner import StepRunner, TorchRunner
from isthmus.errors import CannotStart
from isthmus.log import get_logger
from isthmus.model import Model
from isthmus.steps import Decoder

log = get_logger("engine")


def open_runner(model: Model, decode_rows: int, cache: LatentCache) -> StepRunner:
    """Of a GPU's bf16 model the kernels', or torch's with one line of why not. Raises CannotStart for an fp8 cache."""
    reason = "kernels run on a GPU only"
    if model.device.type == "cuda":
        runner = _triton_runner(model, decode_rows, cache)
        if not isinstance(runner, str):
            return runner
        reason = runner
        _tell_unsupported(reason)
    if any(plane.dtype == "fp8" for plane in cache.layout.planes):
        raise CannotStart("cache_dtype", f"fp8 rows need the kernels: {reason}", "set --cache-dtype auto")
    return TorchRunner(model, cache)


@once
def _tell_unsupported(reason: str) -> None:
    """Once, though the memory profile opens a runner too."""
    log.warning("triton_unsupported", reason=reason, serves="torch")


def _triton_runner(model: Model, decode_rows: int, cache: LatentCache) -> StepRunner | str:
    """The runner, or why there is none."""
    if model.dtype != torch.bfloat16:
        return f"the kernels compute in bf16, the model is {model.dtype}"
    try:
        from isthmus.engine.triton_runner import TritonRunner
        from kernels.table import UnsupportedKernel
    except ImportError as error:
        return f"Triton is not installed: {error}"
    try:
        return TritonRunner(model, cache, decode_rows)
    except (UnsupportedKernel, ValueError) as error:  # not in the table, or a shape that a kernel refuses
        return str(error)
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise CannotStart("device", f"Triton builds its launchers when it starts: {error}", "install gcc") from error


def open_decoder(runner: StepRunner) -> Decoder:
    """Samples on the device where the kernels can, on the host elsewhere."""
    if isinstance(runner, TorchRunner):
        return HostDecoder(runner)
    from isthmus.engine.triton_decoder import TritonDecoder
    from isthmus.engine.triton_runner import TritonRunner
    from kernels.table import UnsupportedKernel

    assert isinstance(runner, TritonRunner)
    try:
        return TritonDecoder(runner)
    except (UnsupportedKernel, ValueError) as error:
        log.warning("device_sampler_unsupported", reason=str(error), samples="host")
        return HostDecoder(runner)
