"""The canary names a numerics class: not the blocks, but everything that changes a bit."""

import dataclasses

import pytest
import torch

from isthmus.engine.canary import run_canary
from isthmus.engine.runner import TorchRunner
from isthmus.errors import CannotStart
from isthmus.kv.block_pool import BlockPool
from isthmus.steps import ignore_stored
from tests.engine.engines import bundled_engine, poison


def test_digest_is_the_same_for_every_block_size_and_pool_state():
    engine = bundled_engine("fp32", 16)
    before = engine.pool.counts()
    held = engine.pool.allocate(7)
    poison(engine)
    again = run_canary(engine.runner, engine.pool)
    engine.pool.release(held)
    assert again == engine.numerics
    assert again == bundled_engine("fp32", 64).numerics
    assert engine.pool.counts() == before


def test_dtype_and_weights_change_the_digest():
    engine = bundled_engine("fp32", 16)
    other = dataclasses.replace(engine.runner.model, norm=engine.runner.model.norm * 1.001)
    changed = run_canary(TorchRunner(other, engine.cache), engine.pool)
    assert len({engine.numerics.digest, changed.digest, bundled_engine("bf16", 16).numerics.digest}) == 3


def test_ingredients_are_readable():
    ingredients = bundled_engine("fp32", 16).numerics.ingredients
    assert ingredients["torch"] == torch.__version__
    assert ingredients["dtype"] == "float32"
    assert {"cpu_capability", "device", "threads", "machine", "model", "cache_dtype"} <= set(ingredients)


class _BatchDependent(TorchRunner):
    """A machine whose products change with the batch."""

    def decode(self, rows, on_stored=ignore_stored):
        logits = super().decode(rows, on_stored)
        return logits * (1 + 2**-20) if len(rows) > 8 else logits


def test_batch_dependent_machine_is_refused():
    engine = bundled_engine("fp32", 16)
    with pytest.raises(CannotStart, match="batch 3"):
        run_canary(_BatchDependent(engine.runner.model, engine.cache), engine.pool)


def test_nan_weights_and_too_small_caches_are_refused():
    engine = bundled_engine("fp32", 16)
    broken = dataclasses.replace(engine.runner.model, norm=engine.runner.model.norm * torch.nan)
    with pytest.raises(CannotStart, match="NaN"):
        run_canary(TorchRunner(broken, engine.cache), engine.pool)
    with pytest.raises(CannotStart, match="blocks"):
        run_canary(engine.runner, BlockPool(10, 16))
