"""The planes of a model's cache, and numbers that the kernels have too."""

from dataclasses import replace

import pytest

from isthmus.checkpoint.directory import Checkpoint
from isthmus.errors import CannotStart
from isthmus.kv.layout import PlaneKind
from isthmus.kv.planes import LATENT, fp8_row_bytes, kv_layout, latent_plane
from isthmus.steps import TILE
from kernels import shapes
from kernels.latents import definition


def test_the_tile_of_the_step_loops_is_that_of_the_kernels() -> None:
    assert TILE == shapes.TILE


def test_an_fp8_row_has_the_bytes_that_the_kernels_store() -> None:
    num_refused = 0
    for rank in [*range(1, 1100), 2048]:
        try:
            stored = definition.fp8_row_bytes(rank, 64)
        except ValueError as error:
            num_refused += 1
            with pytest.raises(CannotStart, match=str(error)) as refused:
                fp8_row_bytes(rank, 64)
            assert refused.value.setting == "cache_dtype"
        else:
            assert fp8_row_bytes(rank, 64) == stored
    assert 0 < num_refused < 1100


def test_mla_has_one_plane_on_every_layer() -> None:
    config = Checkpoint.open("bundled").config
    plane = latent_plane(config, "bf16")
    assert (plane.name, plane.kind, plane.num_layers) == (LATENT, PlaneKind.APPEND_ONLY, config.num_layers)
    assert plane.row_bytes == 2 * (config.kv_lora_rank + config.qk_rope_head_dim)
    assert kv_layout(config, "digest", dtype="bf16", block_size=16).planes == (plane,)


def test_an_fp8_row_is_counted_in_bytes() -> None:
    config = replace(Checkpoint.open("bundled").config, kv_lora_rank=512, qk_rope_head_dim=64)
    plane = latent_plane(config, "fp8")
    assert plane.row_elements == plane.row_bytes == 656
