"""The numerics canary: a fixed computation run at start, whose bits name the worker's numerics class.

Workers of one numerics class give the same bits for the same tokens, so they may continue each other's streams.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from isthmus.engine.runner import StepRunner
from isthmus.errors import CannotStart, NoFreeBlocks
from isthmus.kv.block_pool import BlockPool
from isthmus.kv.planes import LATENT
from isthmus.steps import TILE, DecodeRow, PrefillChunk

_PROMPT_TOKENS: Final = 3 * TILE
_REPLAYED: Final = 8
_DECODED: Final = 8
# Lengths of the other sequences of batch 3; the shorter one stays within its first tile, a product of its own alone.
_OTHERS: Final = (37, 2 * TILE + 5)


@dataclass(frozen=True, slots=True)
class Numerics:
    digest: str  # 32 hex digits over the ingredients, the logits and the latents
    ingredients: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Sequence:
    prompt: tuple[int, ...]
    block_table: Sequence[int]


def run_canary(runner: StepRunner, pool: BlockPool) -> Numerics:
    """The numerics class of this runner, computed in blocks of the pool that are given back.

    The same prompts are computed alone and three at a time. Raises CannotStart if the bits differ, if logits are not
    finite, or if context or pool are too small.
    """
    config = runner.model.config
    context = min(_PROMPT_TOKENS + _REPLAYED + _DECODED, config.context_length)
    if context < _REPLAYED + _DECODED + 2:
        raise CannotStart("context_length", f"{context} is too short for the start-up check", "set it higher")
    lengths = (context - _REPLAYED - _DECODED, *_OTHERS)
    prompts = [_prompt(min(n, lengths[0]), config.vocab_size, salt=salt) for salt, n in enumerate(lengths)]
    blocks_each = runner.cache.layout.num_blocks(context)
    try:
        scratch = pool.allocate(blocks_each * len(prompts))
    except NoFreeBlocks as error:
        problem = f"the start-up check needs {blocks_each * len(prompts)} blocks"
        raise CannotStart("cache_bytes", problem, "set --cache-bytes or --num-blocks higher") from error
    try:
        sequences = [
            _Sequence(prompt, scratch[index * blocks_each : (index + 1) * blocks_each])
            for index, prompt in enumerate(prompts)
        ]
        alone = [_outcomes(runner, [one], cut=None)[0] for one in sequences[:2]]
        # At batch 3 each has another place in the batch, and its prompt is cut between the borders of tiles and blocks.
        together = _outcomes(runner, sequences[::-1], cut=min(21, lengths[0] - 1))[:0:-1]
    finally:
        pool.release(scratch)
    if alone != together:
        problem = "the same tokens give other bits at batch 3 than at batch 1, so results would depend on traffic"
        raise CannotStart("device", problem, "use a torch build named in constraints/cpu.txt and OMP_NUM_THREADS=1")
    ingredients = _ingredients(runner)
    named = "\n".join(f"{name}={value}" for name, value in sorted(ingredients.items()))
    return Numerics(hashlib.sha256(named.encode() + b"".join(alone)).hexdigest()[:32], ingredients)


def _prompt(length: int, vocab_size: int, *, salt: int) -> tuple[int, ...]:
    """Spread over the vocabulary without a random generator, whose stream could change between versions."""
    return tuple((7919 * (index + 1) + 104729 * salt) % vocab_size for index in range(length))


def _outcomes(runner: StepRunner, sequences: Sequence[_Sequence], *, cut: int | None) -> list[bytes]:
    """For each sequence a hash of its logits at every step and of its latents on every layer."""
    states = [hashlib.sha256() for _ in sequences]

    def watch(logits: torch.Tensor) -> None:
        if not bool(torch.isfinite(logits).all()):
            mend = "check the weights and the dtype"
            raise CannotStart("model", "the start-up check gives NaN or infinite logits", mend)
        for state, row in zip(states, logits.cpu(), strict=True):
            state.update(row.numpy().tobytes())

    if cut is not None:
        runner.prefill([PrefillChunk(one.prompt[:cut], 0, one.block_table, needs_logits=False) for one in sequences])
    start = cut or 0
    chunks = [PrefillChunk(one.prompt[start:], start, one.block_table, needs_logits=True) for one in sequences]
    logits = runner.prefill(chunks)
    done = 0
    tokens = [one.prompt[:_REPLAYED] for one in sequences]
    for _ in range(1 + _DECODED):
        watch(logits)
        rows = [
            DecodeRow(token, len(one.prompt) + done + index, one.block_table)
            for one, own in zip(sequences, tokens, strict=True)
            for index, token in enumerate(own)
        ]
        done += len(tokens[0])
        logits = runner.decode(rows)[len(tokens[0]) - 1 :: len(tokens[0])]
        tokens = [(int(token),) for token in logits.argmax(-1)]
    watch(logits)
    for state, one in zip(states, sequences, strict=True):
        blocks = torch.tensor(list(one.block_table), device=runner.model.device)
        for layer in runner.cache.layers[LATENT]:
            latents = layer[blocks].flatten(0, 1)[: len(one.prompt) + done]
            state.update(latents.cpu().view(torch.uint8).numpy().tobytes())
    return [state.digest() for state in states]


def _ingredients(runner: StepRunner) -> dict[str, str]:
    device = runner.model.device
    return {
        "torch": torch.__version__,
        "kernels": runner.kernels,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "cache_dtype": ",".join(plane.dtype for plane in runner.cache.layout.planes),
        "model": runner.cache.layout.model_digest,
    }


def _cpu_name() -> str:
    """The processor's model name: math libraries choose kernels by it, beyond the instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
