"""On every architecture, bits do not depend on chunks, company, prefix reuse, block size or where blocks lie."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from isthmus.engine.engine import Engine
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.runner import TorchRunner
from isthmus.steps import DecodeRow, PrefillChunk
from tests.oracle.configs import ARCHITECTURES
from tests.oracle.models import Write
from tests.oracle.runs import EngineRun, open_engine, prompt

SEED = 8
PROMPT = prompt(203, seed=1)
EMITTED = prompt(8, seed=2)
NUM_POSITIONS = len(PROMPT) + len(EMITTED)

Open = Callable[[int], Engine]
Plain = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def engines(written: Write, architecture: str, request: pytest.FixtureRequest) -> Open:
    """One model's engine with other block sizes: weights are loaded once."""
    first = open_engine(written(architecture, SEED), request.param)
    engines = {16: first}

    def with_block_size(size: int) -> Engine:
        if size not in engines:
            layout = replace(first.layout, block_size=size)
            cache = LatentCache(layout, 4096 // size, first.device)
            engines[size] = replace(first, runner=TorchRunner(first.runner.model, cache), cache=cache, layout=layout)
        return engines[size]

    return with_block_size


@pytest.fixture(scope="module")
def plain(engines: Open) -> Plain:
    """Prefill logits, decode logits and latents: alone, in one chunk, a token a step."""
    run = EngineRun(engines(16), NUM_POSITIONS)
    return run.prefill(PROMPT)[-1], run.decode(EMITTED, len(PROMPT)), run.latents(NUM_POSITIONS)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("cuts", [(1,), (64, 128), (17, 18, 100, 192, 201)])
def test_chunks_and_blocks_do_not_show(engines: Open, plain: Plain, block_size: int, cuts: tuple[int, ...]):
    run = EngineRun(engines(block_size), NUM_POSITIONS, seed=block_size)

    assert torch.equal(run.prefill(PROMPT, cuts)[-1], plain[0])
    assert torch.equal(run.replay(EMITTED, len(PROMPT)), plain[1])
    assert torch.equal(run.latents(NUM_POSITIONS), plain[2])


@pytest.mark.parametrize("reused", [64, 128, 192])
def test_a_reused_prefix_does_not_show(engines: Open, plain: Plain, reused: int):
    run = EngineRun(engines(64), NUM_POSITIONS, seed=3)
    run.prefill([*PROMPT[:reused], 5, 6, 7])
    run.table[reused // 64 :] = run.free[: len(run.table) - reused // 64]

    logits = run.engine.runner.prefill([PrefillChunk(PROMPT[reused:], reused, run.table, needs_logits=True)])

    assert torch.equal(logits[0], plain[0])
    assert torch.equal(run.latents(len(PROMPT)), plain[2][:, : len(PROMPT)])


def test_company_does_not_show(engines: Open, plain: Plain):
    run = EngineRun(engines(16), NUM_POSITIONS, seed=4)
    lengths = [1, 64, 65, 130]
    others = [run.free[20 * i : 20 * i + 20] for i in range(len(lengths))]
    company = [
        PrefillChunk(prompt(n, seed=n), 0, other, needs_logits=n != 64)
        for n, other in zip(lengths, others, strict=True)
    ]
    own = [
        PrefillChunk(PROMPT[:77], 0, run.table, needs_logits=False),
        PrefillChunk(PROMPT[77:], 77, run.table, needs_logits=True),
    ]

    run.engine.runner.prefill([*company[:2], own[0]])
    prefilled = run.engine.runner.prefill([company[2], own[1], company[3]])
    beside = [DecodeRow(token, n, other) for token, (n, other) in enumerate(zip(lengths, others, strict=True))]
    replayed = [DecodeRow(token, len(PROMPT) + i, run.table) for i, token in enumerate(EMITTED)]
    decoded = run.engine.runner.decode([*beside[:3], *replayed, *beside[3:]])

    assert torch.equal(prefilled[1], plain[0])
    assert torch.equal(decoded[3:-1], plain[1])
    assert torch.equal(run.latents(NUM_POSITIONS), plain[2])


def test_a_short_sequence_alone_equals_one_in_company(engines: Open):
    """Alone it has a single tile: a product of batch one, for which a library may have another algorithm."""
    run = EngineRun(engines(16), 64, seed=5)
    other = run.free[:4]
    prefilled = run.prefill(PROMPT[:20])[-1]
    decoded = run.decode(EMITTED, 20)

    together = run.engine.runner.prefill(
        [PrefillChunk(EMITTED, 0, other, needs_logits=True), PrefillChunk(PROMPT[:20], 0, run.table, needs_logits=True)]
    )
    beside = [DecodeRow(7, len(EMITTED), other)]
    again = [
        run.engine.runner.decode([*beside, DecodeRow(token, 20 + i, run.table)])[1] for i, token in enumerate(EMITTED)
    ]

    assert torch.equal(together[1], prefilled)
    assert torch.equal(torch.stack(again), decoded)
