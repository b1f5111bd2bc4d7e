"""Engines on the device, and what tests do with them: prompts in the cache, decode steps in company, greedy tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint, resolve_model
from isthmus.engine.engine import Engine
from isthmus.kv.planes import LATENT
from isthmus.steps import DecodeRow, PrefillChunk, StepLimits
from isthmus.text.tokenizer import Tokenizer
from tests.e2e.prompts import TEXT_PROMPTS
from tests.engine.engines import prompt

NUM_BLOCKS = 4096
LIMITS = StepLimits(decode_rows=256 + 64, prefill_tokens=4096)


@cache
def engine(dtype: Literal["fp32", "bf16"], device: Literal["cpu", "cuda"], block_size: int = 64) -> Engine:
    num_blocks = NUM_BLOCKS * 64 // block_size if device == "cuda" else 4096 // block_size
    return Engine.open(
        Checkpoint.open("bundled"),
        dtype=dtype,
        device=device,
        block_size=block_size,
        num_blocks=num_blocks,
        limits=LIMITS,
    )


@dataclass(frozen=True, slots=True)
class Prompted:
    """A prompt with blocks of its own."""

    tokens: list[int]
    table: list[int]


@cache
def texts() -> list[list[int]]:
    """Prompts in the registers the bundled checkpoint knows: elsewhere it is sure of nothing, and roundings decide."""
    tokenizer = Tokenizer.open(resolve_model("bundled"))
    return [tokenizer.encode(text) for text in TEXT_PROMPTS]


def placed(opened: Engine, prompts: Sequence[list[int]], *, room: int = 64, blocks: int = 0) -> list[Prompted]:
    """In blocks of their own; `blocks` chooses where they lie."""
    order = torch.randperm(opened.cache.shape.num_blocks, generator=torch.Generator().manual_seed(blocks)).tolist()
    return [
        Prompted(tokens, [order.pop() for _ in range(opened.layout.num_blocks(len(tokens) + room))])
        for tokens in prompts
    ]


def prompted(opened: Engine, lengths: Sequence[int], *, room: int = 64, blocks: int = 0) -> list[Prompted]:
    """Prompts of these lengths, prompt i the same for every `blocks`."""
    return placed(opened, [prompt(length, seed) for seed, length in enumerate(lengths)], room=room, blocks=blocks)


def prefill(opened: Engine, sequences: Sequence[Prompted], cuts: Sequence[int] = ()) -> Tensor:
    """Logits [sequences, vocab] of the last tokens; every prompt is cut at `cuts`, together with the others."""
    bounds = [0, *cuts, max(len(one.tokens) for one in sequences)]
    logits: dict[int, Tensor] = {}
    for start, end in pairwise(bounds):
        part = [(i, one) for i, one in enumerate(sequences) if len(one.tokens) > start]
        chunks = [
            PrefillChunk(one.tokens[start:end], start, one.table, needs_logits=end >= len(one.tokens))
            for _, one in part
        ]
        ending = [i for (i, _), chunk in zip(part, chunks, strict=True) if chunk.needs_logits]
        logits.update(zip(ending, opened.runner.prefill(chunks), strict=True))
    return torch.stack([logits[index] for index in range(len(sequences))])


def decode(opened: Engine, sequences: Sequence[Prompted], tokens: Sequence[int], offset: int = 0) -> Tensor:
    """Logits [sequences, vocab] of one step, `offset` tokens after the prompts."""
    rows = [DecodeRow(token, len(one.tokens) + offset, one.table) for one, token in zip(sequences, tokens, strict=True)]
    return opened.runner.decode(rows)


def greedy(opened: Engine, sequences: Sequence[Prompted], num_tokens: int) -> Tensor:
    """Logits [steps, sequences, vocab] of which each step takes the best as its next tokens."""
    steps = [prefill(opened, sequences)]
    for offset in range(num_tokens - 1):
        steps.append(decode(opened, sequences, steps[-1].argmax(-1).tolist(), offset))
    return torch.stack(steps).cpu()


def forced(opened: Engine, sequences: Sequence[Prompted], tokens: Tensor) -> Tensor:
    """Logits [steps, sequences, vocab] along given tokens [steps, sequences]: step i computes token i - 1."""
    steps = [prefill(opened, sequences)]
    for offset, chosen in enumerate(tokens[:-1]):
        steps.append(decode(opened, sequences, chosen.tolist(), offset))
    return torch.stack(steps).cpu()


def latents(opened: Engine, one: Prompted, count: int) -> Tensor:
    """[layers, count, row elements] as stored."""
    return torch.stack([layer[one.table].flatten(0, 1)[:count] for layer in opened.cache.layers[LATENT]]).cpu()
