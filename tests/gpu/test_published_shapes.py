"""On a GPU, at published shapes with random weights, a dense layer and one with experts: the same exactness.

bf16 and fp8 rows of the cache; 16 heads without and 128 heads with a query latent.
"""

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.random_model import published_config, random_model
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.runner import StepRunner, TorchRunner
from isthmus.engine.triton_runner import TritonRunner
from isthmus.kv.planes import LATENT, kv_layout
from isthmus.model import Model
from isthmus.steps import DecodeRow, PrefillChunk
from tests.engine.engines import prompt

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

BLOCK_SIZE, NUM_BLOCKS, CONTEXT = 64, 4096, 16384
BATCHES = (1, 2, 7, 16, 17, 33, 64, 65, 129, 255)


@pytest.fixture(params=["deepseek-v2-lite", "deepseek-v3"], scope="module")
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    device = torch.device("cuda", torch.cuda.current_device())
    config = replace(published_config(request.param, CONTEXT), sparse_layers=(False, True))
    gc.collect()
    torch.cuda.empty_cache()  # of the tests before
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free GPU memory")
    torch.manual_seed(0)
    yield random_model(config, device)
    torch.cuda.empty_cache()


def cache(model: Model, dtype: str) -> LatentCache:
    return LatentCache(kv_layout(model.config, "", dtype=dtype, block_size=BLOCK_SIZE), NUM_BLOCKS, model.device)


def tables(count: int, blocks_each: int, seed: int = 0) -> list[list[int]]:
    order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[i * blocks_each : (i + 1) * blocks_each] for i in range(count)]


def prefill(runner: StepRunner, length: int, table: list[int], *cuts: int) -> torch.Tensor:
    tokens, bounds = prompt(length), [0, *cuts, length]
    for start, end in zip(bounds, bounds[1:], strict=False):  # noqa: RUF007
        logits = runner.prefill([PrefillChunk(tokens[start:end], start, table, needs_logits=True)])
    return logits[0]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_decode_rows_are_the_same_in_every_batch(model: Model, dtype: str):
    runner = TritonRunner(model, cache(model, dtype), max_rows=256)
    for rows in runner.cache.layers[LATENT]:
        random = torch.randn(rows.shape[0], BLOCK_SIZE, 576, device=model.device, dtype=torch.bfloat16)
        rows.copy_(random if dtype == "bf16" else quantised(random))
    lengths = [1 + 61 * i % 900 if i % 32 else 4096 + 37 * i for i in range(256)]
    blocks = iter(tables(1, NUM_BLOCKS)[0])
    rows = [
        DecodeRow(i, length - 1, [next(blocks) for _ in range(-(-length // BLOCK_SIZE))])
        for i, length in enumerate(lengths)
    ]
    everyone = runner.decode(rows)
    assert bool(torch.isfinite(everyone).all())
    for count in BATCHES:
        assert torch.equal(runner.decode(rows[:count]), everyone[:count]), count
        assert torch.equal(runner.decode(rows[-count:][::-1]).flip(0), everyone[-count:]), count


def quantised(rows: torch.Tensor) -> torch.Tensor:
    from kernels.latents.definition import quantise_latents

    return quantise_latents(rows.flatten(0, 1), 512).unflatten(0, rows.shape[:2])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_cuts_and_blocks_change_no_bit_of_a_prompt(model: Model, dtype: str):
    runner = TritonRunner(model, cache(model, dtype), max_rows=16)
    places = tables(4, 64)
    expected = prefill(runner, 3000, places[0])
    assert bool(torch.isfinite(expected).all())
    assert torch.equal(prefill(runner, 3000, places[1], 64, 1024), expected)
    assert torch.equal(prefill(runner, 3000, places[2], 1, 130, 131, 2500), expected)
    both = [PrefillChunk(prompt(3000), 0, places[3], needs_logits=True), PrefillChunk([5], 0, places[0], False)]
    assert torch.equal(runner.prefill(both)[0], expected)


def test_kernels_are_near_to_torch(model: Model):
    """In the logits' own scale; experts whose scores are near may change places, which moves a few rows further."""
    triton, torchs = TritonRunner(model, cache(model, "bf16"), max_rows=16), TorchRunner(model, cache(model, "bf16"))
    table = tables(1, 16)[0]
    results = []
    for runner in (triton, torchs):
        first = prefill(runner, 700, table)
        later = [runner.decode([DecodeRow(i, 700 + i, table)])[0] for i in range(24)]
        results.append(torch.stack([first, *later]))
    cosine = torch.nn.functional.cosine_similarity(*results, dim=-1)
    print({"least": float(cosine.min()), "median": float(cosine.median())})
    assert float(cosine.median()) > 0.999
    assert float(cosine.min()) > 0.9
