"""Every kernel that a served model needs is in the table, on every architecture: steps whose launches do nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton.runtime.interpreter
from torch import Tensor

import isthmus
import kernels.table
from benchmarks.random_model import RandomWeights
from isthmus.checkpoint.model_config import ModelConfig, parse_config
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.triton_decoder import TritonDecoder
from isthmus.engine.triton_runner import TritonRunner
from isthmus.kv.planes import kv_layout
from isthmus.model.linear import Fp8ExpertStack, Fp8Linear
from isthmus.model.load import assemble
from kernels.lang import INTERPRETED
from tools.checkpoints.published import PUBLISHED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches can be left out under the interpreter only")

CPU = torch.device("cpu")
BUNDLED = json.loads((Path(isthmus.__file__).parent / "bundled/config.json").read_text(encoding="utf-8"))


class UnsetWeights(RandomWeights):
    """Of the right shapes; nothing looks at a value."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(self.shapes[name], dtype=dtype or self.dtype)

    def _matrices(self, matrices) -> Tensor:
        shapes = [self.shapes[f"{part.name}.weight"] for part in matrices[0]]
        return torch.empty(len(matrices), sum(shape[0] for shape in shapes), shapes[0][1], dtype=self.dtype)


class UnsetFp8Weights(UnsetWeights):
    def linear(self, *parts) -> Fp8Linear:
        experts = self.stack([parts])
        return Fp8Linear(experts.weight[0], experts.scales[0], self.dtype)

    def stack(self, matrices) -> Fp8ExpertStack:
        shape = self._matrices(matrices).shape
        scales = torch.empty(*shape[:2], -(-shape[2] // 128))
        return Fp8ExpertStack(torch.empty(shape, dtype=torch.float8_e4m3fn), scales, self.dtype)


def two_layers(name: str) -> ModelConfig:
    """A dense one and a narrow one with experts: widths are no part of a variant."""
    config = parse_config(BUNDLED if name == "bundled" else PUBLISHED[name], 512)
    assert config.experts is not None
    return replace(config, sparse_layers=(False, True), experts=replace(config.experts, width=128))


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", lambda *_, **__: None)


def run_steps(config: ModelConfig, weights: type[RandomWeights], cache_dtype: str, block_size: int) -> None:
    model = assemble(config, weights(config, torch.bfloat16, CPU))
    cache = LatentCache(kv_layout(config, "", dtype=cache_dtype, block_size=block_size), 4, CPU)
    runner = TritonRunner(model, cache, max_rows=64)  # runs a step of each kind
    TritonDecoder(runner)._sampler.launch(torch.zeros(16, config.vocab_size))


@pytest.mark.parametrize("architecture", kernels.table.ARCHITECTURES)
@pytest.mark.parametrize("name", ["bundled", "deepseek-v2-lite", "deepseek-v3", "kimi-k2", "moonlight"])
def test_bf16(no_launches: None, monkeypatch: pytest.MonkeyPatch, name: str, architecture: str):
    monkeypatch.setattr(kernels.table, "architecture_of", lambda _: architecture)
    for block_size in (16, 64):
        run_steps(two_layers(name), UnsetWeights, "bf16", block_size)


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v3"])
def test_fp8_weights_and_rows(no_launches: None, monkeypatch: pytest.MonkeyPatch, name: str, architecture: str):
    monkeypatch.setattr(kernels.table, "architecture_of", lambda _: architecture)
    run_steps(two_layers(name), UnsetFp8Weights, "fp8", 64)
