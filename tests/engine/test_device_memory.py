"""Rows of a cache that the host cannot see: the same bytes as where it can, and no other row touched."""

import random
import threading

import numpy as np
import pytest
import torch

from isthmus.engine import device_memory
from isthmus.engine.device_memory import DeviceMemory
from isthmus.engine.latent_cache import LatentCache
from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.kv.planes import LATENT
from isthmus.types import Place
from kernels.latents.transfer import gather_rows, scatter_rows
from kv_transfer.pool_memory import PoolMemory, RowMemory
from tests.conftest import has_cuda

LAYOUT = KvLayout(
    "digest",
    (Plane("latent", PlaneKind.APPEND_ONLY, 2, 20, "bf16"), Plane("index", PlaneKind.APPEND_ONLY, 1, 12, "fp32")),
    block_size=16,
)
NUM_BLOCKS = 12
COPIES = {
    "torch": (device_memory.gather_rows, device_memory.scatter_rows),
    "kernels": (gather_rows, scatter_rows),
}
POISON = 0xFF


def caches(seed: int) -> tuple[LatentCache, dict[Place, memoryview]]:
    """The same bytes twice: on the device, and where the host sees them."""
    cache = LatentCache(LAYOUT, NUM_BLOCKS, torch.device("cuda" if has_cuda() else "cpu"))
    rng, memory = np.random.default_rng(seed), {}
    for plane, layer in LAYOUT.places:
        rows = cache.layers[plane][layer].view(torch.uint8)
        content = rng.integers(0, 256, rows.numel(), dtype=np.uint8)
        rows.copy_(torch.from_numpy(content).view_as(rows))
        memory[plane, layer] = memoryview(bytearray(content.tobytes()))
    return cache, memory


def content(cache: LatentCache) -> dict[Place, bytes]:
    return {
        (plane, layer): cache.layers[plane][layer].view(torch.uint8).cpu().numpy().tobytes()
        for plane, layer in LAYOUT.places
    }


def any_rows(rng: random.Random) -> tuple[Place, list[int], tuple[int, int]]:
    table = rng.sample(range(NUM_BLOCKS), rng.randint(1, 6))
    first = rng.randrange(len(table) * LAYOUT.block_size)
    return rng.choice(LAYOUT.places), table, (first, rng.randint(first + 1, len(table) * LAYOUT.block_size))


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("staging_bytes", [48, 7 * 48, 1 << 16], ids=["a row", "seven rows", "all"])
def test_it_reads_and_writes_what_memory_of_the_host_does(copies: str, staging_bytes: int) -> None:
    rng = random.Random(staging_bytes)
    cache, memory = caches(seed=1)
    gather, scatter = COPIES[copies]
    on_device: RowMemory = DeviceMemory(cache, gather=gather, scatter=scatter, staging_bytes=staging_bytes)
    on_host: RowMemory = PoolMemory(LAYOUT, memory)
    assert (on_device.layout, on_device.num_blocks) == (on_host.layout, on_host.num_blocks)
    for turn in range(12 if staging_bytes > 48 else 2):
        place, table, interval = any_rows(rng)
        num_bytes = (interval[1] - interval[0]) * on_host.row_bytes(place[0])
        read = [bytearray([POISON]) * (num_bytes + 8) for _ in range(2)]
        on_device.read_rows(place, table, interval, read[0])
        on_host.read_rows(place, table, interval, read[1])
        assert read[0] == read[1]
        assert read[0][num_bytes:] == bytes([POISON]) * 8, "written beyond the rows"
        place, table, interval = any_rows(rng)
        num_bytes = (interval[1] - interval[0]) * on_host.row_bytes(place[0])
        body = memoryview(rng.randbytes(num_bytes + 8))  # read-only, and longer than the rows, as a frame's rest may be
        on_device.write_rows(place, table, interval, body)
        on_host.write_rows(place, table, interval, body)
        assert content(cache) == {place: bytes(rows) for place, rows in memory.items()}, turn


def test_opening_changes_nothing_and_a_table_is_checked() -> None:
    cache, memory = caches(seed=2)
    on_device = DeviceMemory(cache)
    assert content(cache) == {place: bytes(rows) for place, rows in memory.items()}
    assert on_device.contiguous(("latent", 0), [0, 1], (0, 32)) is None
    on_device.check_table([0, NUM_BLOCKS - 1])
    for table in ([-1], [0, NUM_BLOCKS]):
        with pytest.raises(ValueError, match="block ids"):
            on_device.check_table(table)


def test_one_thread_reads_while_another_writes() -> None:
    cache, memory = caches(seed=3)
    on_device = DeviceMemory(cache, staging_bytes=7 * 48)
    body, read, expected = bytes(range(256)) * 12, bytearray(96 * 40), bytearray(96 * 40)
    PoolMemory(LAYOUT, memory).read_rows(("latent", 1), range(6), (0, 96), expected)

    def write() -> None:
        for _ in range(50):
            on_device.write_rows(("latent", 1), range(6, 12), (3, 70), body)

    writing = threading.Thread(target=write)
    writing.start()
    for _ in range(50):
        on_device.read_rows(("latent", 1), range(6), (0, 96), read)
        assert read == expected
    writing.join()
    PoolMemory(LAYOUT, memory).write_rows(("latent", 1), range(6, 12), (3, 70), body)
    assert content(cache) == {place: bytes(rows) for place, rows in memory.items()}


@pytest.mark.gpu
def test_a_read_waits_for_the_rows_of_its_layer_and_not_for_what_follows() -> None:
    cache, _ = caches(seed=4)
    on_device, read = DeviceMemory(cache), bytearray(16 * 40)
    torch.cuda._sleep(200_000_000)
    cache.layers[LATENT][0].fill_(1.0)
    cache.stored.note(LATENT, 0)
    torch.cuda._sleep(2_000_000_000)
    last = torch.cuda.Event()
    last.record()
    on_device.read_rows(("latent", 0), [0], (0, 16), read)
    assert not last.query(), "it waited for the whole queue"
    assert read == torch.ones(16 * 20, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    torch.cuda.synchronize()
