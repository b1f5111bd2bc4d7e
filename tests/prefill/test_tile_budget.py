"""The tile budget: measured at the start so that a layer stays short, without a trace in numerics or cache."""

from collections.abc import Sequence
from dataclasses import replace
from time import sleep

import pytest
from torch import Tensor

from isthmus.clock import SystemClock
from isthmus.engine.canary import run_canary
from isthmus.engine.runner import TorchRunner
from isthmus.steps import OnStored, PrefillChunk, ignore_stored
from prefill_service.tile_budget import measure_tile_budget
from tests.engine.engines import bundled_engine

CLOCK = SystemClock()


class SlowRunner(TorchRunner):
    """Every layer takes `ms_per_token` longer; counts the layers."""

    ms_per_token = 0.0
    num_layers = 0

    def prefill(self, chunks: Sequence[PrefillChunk], on_stored: OnStored = ignore_stored) -> Tensor:
        def slowly(plane: str, layer: int) -> None:
            self.num_layers += 1
            sleep(self.ms_per_token * sum(len(chunk.token_ids) for chunk in chunks) / 1000)
            on_stored(plane, layer)

        return super().prefill(chunks, slowly)


def test_the_measurement_leaves_no_trace() -> None:
    engine = bundled_engine()
    before = (engine.pool.counts(), engine.pool.published())
    assert measure_tile_budget(engine, CLOCK.now) in (64, 128, 192, 256)
    assert (engine.pool.counts(), engine.pool.published()) == before
    assert run_canary(engine.runner, engine.pool).digest == engine.numerics.digest


@pytest.mark.parametrize(("ms_per_token", "expected", "most_layers"), [(0.5, (64, 128), 12), (2.0, (64,), 3)])
def test_a_slow_model_gets_fewer_tokens_a_step_but_a_tile_at_least(
    ms_per_token: float, expected: tuple[int, ...], most_layers: int
) -> None:
    engine = bundled_engine()
    runner = SlowRunner(engine.runner.model, engine.cache)
    runner.ms_per_token = ms_per_token
    assert measure_tile_budget(replace(engine, runner=runner), CLOCK.now) in expected
    assert runner.num_layers <= most_layers
