"""Opening an engine: what it offers, what it refuses."""

import pytest
import torch

from isthmus.checkpoint.directory import Checkpoint
from isthmus.config import DecodeConfig, load
from isthmus.engine.engine import Engine
from isthmus.errors import CannotStart
from isthmus.kv.planes import LATENT
from isthmus.worker.engine_start import open_engine
from tests.engine.engines import bundled_engine


def test_engine_says_what_it_is():
    engine = bundled_engine("bf16", 32)
    config = engine.model_config
    assert engine.context_length == config.context_length
    assert (engine.dtype, engine.device.type) == ("bf16", "cpu")
    assert engine.layout.block_size == 32
    assert engine.layout.planes[0].row_elements == config.kv_lora_rank + config.qk_rope_head_dim
    assert engine.pool.counts().free == engine.cache.shape.num_blocks == 128


def test_cache_memory_is_the_blocks_themselves():
    engine = bundled_engine("fp32", 16)
    memory, layer = engine.cache.memory(0, 1), engine.cache.layers[LATENT][1]
    assert memory.format == "B"
    assert not memory.readonly
    assert len(memory) == engine.cache.shape.num_blocks * 16 * engine.layout.planes[0].row_bytes
    layer[3, 2, 5] = 1.5
    offset = ((3 * 16 + 2) * layer.shape[2] + 5) * 4
    assert torch.frombuffer(memory[offset : offset + 4], dtype=torch.float32).item() == 1.5


def test_a_cache_too_small_for_one_request_is_named():
    config = load(DecodeConfig, ["--cache-bytes", "64KiB"], {})
    with pytest.raises(CannotStart) as refused:
        open_engine(config, lambda _: None)
    assert refused.value.setting == "cache_bytes"


def test_cache_bytes_bound_the_blocks():
    config = load(DecodeConfig, ["--cache-bytes", "1MiB", "--context-length", "256"], {})
    engine = open_engine(config, lambda _: None)
    assert engine.cache.shape.num_blocks == (1 << 20) // engine.layout.block_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_missing_cuda_is_named():
    with pytest.raises(CannotStart, match="CUDA"):
        Engine.open(Checkpoint.open("bundled"), device="cuda", num_blocks=1)
