"""The paged cache of latents: one tensor per plane and layer. The block pool owns who may use which block."""

import torch

from isthmus.errors import NotYet
from isthmus.kv.layout import KvLayout
from isthmus.kv.slots import CacheShape

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
_LAYERS_AHEAD = 2  # launched while the device computes


class StoredLayers:
    """When the newest rows of each plane and layer are there: events that transfers wait for.

    Written by the thread that launches steps. On a CPU nothing is noted: rows are there when their step says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: dict[tuple[str, int], torch.cuda.Event] = {}

    def note(self, plane: str, layer: int) -> None:
        """What stores the place's rows is launched on the current stream. For the thread that launches.

        Returns when the plane's layer _LAYERS_AHEAD before is there: a prompt that is cancelled has little more on its
        way.
        """
        if not self._is_cuda:
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._events[plane, layer] = event
        if before := self._events.get((plane, layer - _LAYERS_AHEAD)):
            before.synchronize()

    def wait(self, plane: str, layer: int) -> None:
        """Has the current stream wait until the place's rows are there. Any thread."""
        if event := self._events.get((plane, layer)):
            torch.cuda.current_stream().wait_event(event)


class LatentCache:
    """`layers[plane name][layer]` is [num_blocks, block_size, row_elements], written by step loop and receiver.

    `rows[plane name][layer]` is the same memory as [slots + 1, row_elements]; a slot is block * block_size + offset.
    A block is written by whoever holds it in the block pool, one thread at a time; the tensors are never replaced.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.shape = CacheShape(num_blocks, layout.block_size)
        self.stored = StoredLayers(device)
        # One row past the last block stays zero: steps read it in place of keys that must not be seen.
        num_rows = self.shape.zero_slot + 1
        self.rows = {
            plane.name: [
                torch.zeros(num_rows, plane.row_elements, dtype=TORCH_DTYPES[plane.dtype], device=device)
                for _ in range(plane.num_layers)
            ]
            for plane in layout.planes
        }
        self.layers = {
            name: [rows[: self.shape.zero_slot].unflatten(0, (num_blocks, layout.block_size)) for rows in plane]
            for name, plane in self.rows.items()
        }

    def memory(self, plane: str, layer: int) -> memoryview:
        """Writable bytes of all blocks of one layer, for the transfer path; they live as long as this cache."""
        blocks = self.layers[plane][layer]
        if blocks.device.type != "cpu":
            raise NotYet(f"transfer memory on {blocks.device.type}")
        return blocks.view(torch.uint8).numpy().reshape(-1).data
