"""`python -m tests.kernels.compile_only MODEL`: steps whose launches compile for sm_90 and do nothing, without a GPU.

What a step compiles that the runner's warm-up did not is printed: it would be compiled while requests wait or a graph
is captured, and a row would be computed by other code in one batch than in another.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.triton_decoder import TritonDecoder
from isthmus.engine.triton_runner import TritonRunner
from isthmus.kv.planes import kv_layout
from isthmus.model.load import assemble
from isthmus.steps import PrefillChunk
from tests.engine.test_kernel_coverage import CPU, UnsetWeights, two_layers

BLOCK_SIZE, NUM_BLOCKS = 16, 16


class Absent:
    """A driver of a device that is not there: Triton asks it what to compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CPU


class Compiled:
    """Every kernel that a launch asked for; `new()` are those since the last call."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        self.num_told = 0

    def launch(self, run: Any) -> Any:
        def only_compiled(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            self.names.setdefault(compiled.hash, kernel.fn.__name__)
            return compiled

        return only_compiled

    def new(self) -> list[str]:
        names = list(self.names.values())[self.num_told :]
        self.num_told += len(names)
        return names


def steps(runner: TritonRunner, decoder: TritonDecoder, vocab_size: int) -> Any:
    """Names of steps of every size and kind; each has run when the next is asked for."""
    for bucket in runner.buffers.buckets:
        runner.graphs.run_eagerly(bucket)
        decoder._sampler.launch(torch.zeros(bucket, vocab_size))
        yield f"decode, {bucket} rows"
    for num_tokens in (2, 3, 16, 17, 33, 128, 129, 200):
        runner.prefill([PrefillChunk((0,) * num_tokens, 0, tuple(range(NUM_BLOCKS)), needs_logits=True)])
        yield f"prefill, {num_tokens} tokens"
    for count in (2, 17):
        runner.prefill([PrefillChunk((0,) * 5, start, (0, 1), needs_logits=True) for start in range(count)])
        yield f"prefill, {count} sequences"


def main(name: str) -> None:
    driver.set_active(Absent())
    compiled = Compiled()
    JITFunction.run = compiled.launch(JITFunction.run)
    config = two_layers(name)
    model = assemble(config, UnsetWeights(config, torch.bfloat16, CPU))
    cache = LatentCache(kv_layout(config, "", dtype="bf16", block_size=BLOCK_SIZE), NUM_BLOCKS, CPU)
    runner = TritonRunner(model, cache, max_rows=256)
    decoder = TritonDecoder(runner)
    decoder._sampler.launch(torch.zeros(BLOCK_SIZE, config.vocab_size))  # as it does where there is a device
    print(f"warm-up: {len(compiled.new())} kernels")
    for step in steps(runner, decoder, config.vocab_size):
        for kernel in compiled.new():
            print(f"{step}: compiled {kernel} anew")
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
