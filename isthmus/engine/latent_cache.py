"""The paged cache of latents: one tensor per plane and layer. The block pool owns who may use which block."""

import torch

from isthmus.errors import NotYet
from isthmus.kv.layout import KvLayout
from isthmus.model.step import CacheShape

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
_LAYERS_AHEAD = 2  # launched while the device computes


class StoredLayers:
    """When each layer's newest rows are there: events that transfers wait for. On a CPU a layer's end is enough."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: dict[int, torch.cuda.Event] = {}

    def note(self, layer: int) -> None:
        """What stores the layer's rows is launched on the current stream. For the thread that launches.

        Returns when the layer _LAYERS_AHEAD before is there: a prompt that is cancelled has little more on its way.
        """
        if not self._is_cuda:
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._events[layer] = event
        if before := self._events.get(layer - _LAYERS_AHEAD):
            before.synchronize()

    def wait(self, layer: int) -> None:
        """Has the current stream wait until the layer's rows are there. Any thread."""
        if event := self._events.get(layer):
            torch.cuda.current_stream().wait_event(event)


class LatentCache:
    """`layers[plane name][layer]` is [num_blocks, block_size, row_elements], written by step loop and receiver.

    `rows[plane name][layer]` is the same memory as [slots + 1, row_elements]; a slot is block * block_size + offset.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.shape = CacheShape(num_blocks, layout.block_size)
        self.stored = StoredLayers(device)
        # One row past the last block stays zero: steps read it in place of keys that must not be seen.
        self.rows = {
            plane.name: [
                torch.zeros(
                    self.shape.zero_slot + 1, plane.row_elements, dtype=TORCH_DTYPES[plane.dtype], device=device
                )
                for _ in range(plane.num_layers)
            ]
            for plane in layout.planes
        }
        self.layers = {
            name: [rows[: self.shape.zero_slot].unflatten(0, (num_blocks, layout.block_size)) for rows in layers]
            for name, layers in self.rows.items()
        }

    def memory(self, plane: str, layer: int) -> memoryview:
        """Writable bytes of all blocks of one layer, for the transfer path; they live as long as this cache."""
        blocks = self.layers[plane][layer]
        if blocks.device.type != "cpu":
            raise NotYet(f"transfer memory on {blocks.device.type}")
        return blocks.view(torch.uint8).numpy().reshape(-1).data
