"""Bits do not depend on batch, chunking, prefix reuse, block order or block size; every unused slot holds NaN."""

import pytest
import torch

from isthmus.steps import DecodeRow, PrefillChunk
from tests.engine.engines import bundled_engine, decode_each, latents, poison, prefill, prompt, scattered_table

PROMPT = prompt(203)
EMITTED = prompt(9, seed=3)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prefill logits, decode logits and latents of PROMPT + EMITTED: alone, in one chunk, a token a step."""
    engine = bundled_engine(dtype, 16)
    poison(engine)
    table = scattered_table(engine, 212, seed=1)
    prefilled = prefill(engine, PROMPT, table)
    decoded = decode_each(engine, EMITTED, len(PROMPT), table)
    return prefilled, decoded, latents(engine, table, 212)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("cuts", [(), (1,), (64, 128), (17, 18, 100, 201)])
def test_chunks_and_blocks_do_not_show(plain, dtype: str, block_size: int, cuts: tuple[int, ...]):
    engine = bundled_engine(dtype, block_size)
    poison(engine)
    table = scattered_table(engine, 212, seed=block_size)

    prefilled = prefill(engine, PROMPT, table, cuts=cuts)
    decoded = decode_each(engine, EMITTED, len(PROMPT), table)

    assert torch.equal(prefilled, plain[0])
    assert torch.equal(decoded, plain[1])
    assert torch.equal(latents(engine, table, 212), plain[2])


def test_replayed_tokens_equal_decoded_ones(plain, dtype: str):
    engine = bundled_engine(dtype, 16)
    poison(engine)
    table = scattered_table(engine, 212, seed=5)
    prefill(engine, PROMPT, table)

    replayed = engine.runner.decode([DecodeRow(t, len(PROMPT) + i, table) for i, t in enumerate(EMITTED)])

    assert torch.equal(replayed, plain[1])
    assert torch.equal(latents(engine, table, 212), plain[2])


def test_a_long_replay_among_others_equals_single_steps(dtype: str):
    engine = bundled_engine(dtype, 16)
    poison(engine)
    order = scattered_table(engine, 4096, seed=8)
    tables = [order[:20], order[20:40], order[40:60]]
    tokens = prompt(160, seed=6)
    for table in tables:
        prefill(engine, tokens[:40], table)
    single = decode_each(engine, tokens[40:], 40, tables[0])

    replay = [DecodeRow(tokens[i], i, tables[1]) for i in range(40, 160)]
    together = engine.runner.decode([*replay[:50], DecodeRow(7, 40, tables[2]), *replay[50:]])

    assert torch.equal(torch.cat((together[:50], together[51:])), single)


def test_company_in_prefill_does_not_show(plain, dtype: str):
    engine = bundled_engine(dtype, 16)
    poison(engine)
    order = scattered_table(engine, 4096, seed=9)
    table, others = order[:14], [order[14 + 20 * i : 34 + 20 * i] for i in range(5)]
    lengths = [1, 64, 65, 130, 300]
    company = [
        PrefillChunk(prompt(n, seed=n), 0, other, needs_logits=n != 64)
        for n, other in zip(lengths, others, strict=True)
    ]
    own = (
        PrefillChunk(PROMPT[:77], 0, table, needs_logits=False),
        PrefillChunk(PROMPT[77:], 77, table, needs_logits=True),
    )

    engine.runner.prefill([*company[:2], own[0]])
    logits = engine.runner.prefill([company[2], own[1], company[3], company[4]])

    assert torch.equal(logits[1], plain[0])
    assert torch.equal(latents(engine, table, 203), plain[2][:, :203])


@pytest.mark.parametrize("batch", [2, 3, 15, 16, 17, 33])
def test_company_in_decode_does_not_show(plain, dtype: str, batch: int):
    engine = bundled_engine(dtype, 16)
    poison(engine)
    order = scattered_table(engine, 4096, seed=batch)
    table, free = order[:14], order[14:]
    prefill(engine, PROMPT, table)
    company = []
    for index in range(batch - 1):
        length = 1 + (index * 29) % 90
        own, free = free[:6], free[6:]
        prefill(engine, prompt(length, seed=index), own)
        company.append((length, own))

    for step, token in enumerate(EMITTED[:3]):
        rows = [DecodeRow(index, length + step, own) for index, (length, own) in enumerate(company)]
        place = (step * 5) % batch
        rows.insert(place, DecodeRow(token, len(PROMPT) + step, table))
        assert torch.equal(engine.runner.decode(rows)[place], plain[1][step])


def test_a_reused_prefix_gives_the_same_bits(plain, dtype: str):
    engine = bundled_engine(dtype, 16)
    poison(engine)
    order = scattered_table(engine, 4096, seed=11)
    prefill(engine, [*PROMPT[:128], 5, 6, 7], order[:9])
    table = [*order[:8], *order[20:26]]

    logits = engine.runner.prefill([PrefillChunk(PROMPT[128:], 128, table, needs_logits=True)])

    assert torch.equal(logits[0], plain[0])


def test_a_sequence_of_nan_leaves_others_alone(plain, dtype: str):
    engine = bundled_engine(dtype, 16)
    poison(engine)
    order = scattered_table(engine, 4096, seed=12)
    table, broken = order[:14], order[14:28]
    prefill(engine, PROMPT, table)

    logits = engine.runner.decode([DecodeRow(1, 150, broken), DecodeRow(EMITTED[0], len(PROMPT), table)])

    assert torch.isnan(logits[0]).all()
    assert torch.equal(logits[1], plain[1][0])
