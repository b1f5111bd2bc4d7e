"""How many blocks a memory profile allows."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from isthmus.checkpoint.directory import Checkpoint
from isthmus.config import DecodeConfig, PrefillConfig, load
from isthmus.engine.engine import Engine
from isthmus.engine.memory_profile import FRACTION, MemoryProfile, _prefill
from isthmus.engine.runner import StepRunner
from isthmus.errors import CannotStart
from isthmus.kv.planes import kv_layout, stored_as
from isthmus.steps import PrefillChunk
from isthmus.worker.engine_start import CPU_CACHE_BYTES, open_engine

GIB = 1 << 30


def test_what_the_steps_leave_is_for_blocks():
    profile = MemoryProfile(free=100 * GIB, runner=5 * GIB, prefill_peak=3 * GIB, decode_peak=2 * GIB)
    assert profile.num_blocks(GIB) == int(100 * FRACTION) - 5 - 3
    assert profile.num_blocks(GIB // 2) == 2 * profile.num_blocks(GIB)


def test_prefill_and_decode_steps_share_their_memory():
    one = MemoryProfile(free=10 * GIB, runner=0, prefill_peak=GIB, decode_peak=4 * GIB)
    other = MemoryProfile(free=10 * GIB, runner=0, prefill_peak=4 * GIB, decode_peak=GIB)
    assert one.num_blocks(1000) == other.num_blocks(1000)


def test_blocks_never_exceed_the_fraction_and_are_never_negative():
    assert MemoryProfile(10 * GIB, 0, 0, 0).num_blocks(7) * 7 <= FRACTION * 10 * GIB
    assert MemoryProfile(10 * GIB, 9 * GIB, GIB, 0).num_blocks(1) == 0
    assert MemoryProfile(0, 0, 0, 0).num_blocks(1) == 0


def test_on_a_cpu_an_unset_cache_has_256_mib():
    engine = open_engine(load(PrefillConfig, ["--context-length", "256"], {}), lambda _: None)
    assert engine.cache.shape.num_blocks == CPU_CACHE_BYTES // engine.layout.block_bytes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_that_are_set_must_hold_a_request(device: str):
    config = load(DecodeConfig, ["--num-blocks", "4", "--device", device], {})
    with pytest.raises(CannotStart) as refused:
        open_engine(config, lambda _: None)
    assert refused.value.setting == "cache_bytes"


@pytest.mark.parametrize(("dtype", "device"), [("bf16", "cpu"), ("fp32", "cuda")])
def test_fp8_rows_are_refused_where_the_kernels_do_not_run(dtype: str, device: str):
    with pytest.raises(CannotStart) as refused:
        stored_as(dtype, "fp8", device)
    assert refused.value.setting == "cache_dtype"
    assert stored_as("bf16", "fp8", "cuda") == "fp8"
    assert stored_as(dtype, "auto", device) == dtype


@pytest.mark.parametrize(("num_tokens", "lengths"), [(100, [100]), (256, [256]), (600, [256, 256, 88])])
def test_a_step_of_more_tokens_than_a_context_is_profiled_whole(num_tokens: int, lengths: list[int]):
    """Prompts of several sequences share a step."""
    config = Checkpoint.open("bundled", 256).config
    seen: list[Sequence[PrefillChunk]] = []
    runner = SimpleNamespace(prefill=lambda chunks, _: seen.append(chunks))
    _prefill(cast("StepRunner", runner), config, kv_layout(config, "", dtype="bf16", block_size=16), num_tokens)
    assert [len(chunk.token_ids) for chunk in seen[0]] == lengths
    assert {chunk.end for chunk in seen[0]} == {256}


def test_a_gpu_without_room_is_named(monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Engine, "open", full)
    with pytest.raises(CannotStart, match="Tried to allocate") as refused:
        open_engine(load(DecodeConfig, [], {}), lambda _: None)
    assert refused.value.setting == "device"
