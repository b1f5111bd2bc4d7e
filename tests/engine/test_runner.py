"""Steps: callbacks per layer, aborting, and refusing rows that would hurt others."""

import pytest
import torch

from isthmus.kv.planes import LATENT
from isthmus.steps import DecodeRow, PrefillChunk
from tests.engine.engines import bundled_engine, latents, poison, prefill, prompt


def test_a_layers_latents_are_stored_when_it_is_announced():
    engine = bundled_engine()
    poison(engine)
    announced = []

    def on_stored(plane: str, layer: int) -> None:
        assert plane == LATENT
        announced.append(layer)
        stored = [bool(torch.isfinite(rows[:3].flatten(0, 1)[:40]).all()) for rows in engine.cache.layers[LATENT]]
        assert stored == [index <= layer for index in range(len(stored))]

    engine.runner.prefill([PrefillChunk(prompt(40), 0, [0, 1, 2], needs_logits=False)], on_stored)
    assert announced == list(range(engine.model_config.num_layers))


def test_a_step_writes_its_own_positions_only():
    engine = bundled_engine()
    poison(engine)
    prefill(engine, prompt(37), [4, 2, 9])
    engine.runner.decode([DecodeRow(5, 37, [4, 2, 9])])
    for layer in engine.cache.layers[LATENT]:
        finite = torch.isfinite(layer).all(-1).sum(-1)
        assert {block: int(count) for block, count in enumerate(finite) if count} == {4: 16, 2: 16, 9: 6}


def test_what_the_callback_raises_ends_the_step():
    engine = bundled_engine()
    poison(engine)

    def stop(_plane: str, layer: int) -> None:
        if layer == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.runner.decode([DecodeRow(5, 0, [0])], stop)
    assert torch.isfinite(latents(engine, [0], 1)[:2]).all()
    assert torch.isnan(latents(engine, [0], 1)[2:]).all()


def test_no_logits_wanted_gives_an_empty_tensor():
    engine = bundled_engine()
    logits = engine.runner.prefill([PrefillChunk(prompt(3), 0, [0], needs_logits=False)])
    assert logits.shape == (0, engine.model_config.vocab_size)


@pytest.mark.parametrize(
    "row",
    [
        DecodeRow(-1, 0, [0]),
        DecodeRow(2048, 0, [0]),
        DecodeRow(1, -1, [0]),
        DecodeRow(1, 16, [0]),
        DecodeRow(1, 9999, [0] * 999),
    ],
)
def test_rows_outside_vocabulary_context_or_table_are_refused(row: DecodeRow):
    with pytest.raises(ValueError, match=r"token ids|context|blocks"):
        bundled_engine().runner.decode([DecodeRow(1, 0, [1]), row])


def test_an_empty_step_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        bundled_engine().runner.decode([])
