"""The paged cache of latents: one tensor per plane and layer. The block pool owns who may use which block."""

import torch

from isthmus.errors import NotYet
from isthmus.kv_layout import KvLayout
from isthmus.model.step import CacheShape

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LatentCache:
    """`layers[plane][layer]` is [num_blocks, block_size, row_elements], written by step loop and receiver.

    `rows[plane][layer]` is the same memory as [slots + 1, row_elements]; a slot is block * block_size + offset.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.shape = CacheShape(num_blocks, layout.block_size)
        # One row past the last block stays zero: steps read it in place of keys that must not be seen.
        self.rows = [
            [
                torch.zeros(
                    self.shape.zero_slot + 1, plane.row_elements, dtype=TORCH_DTYPES[plane.dtype], device=device
                )
                for _ in range(plane.num_layers)
            ]
            for plane in layout.planes
        ]
        self.layers = [
            [rows[: self.shape.zero_slot].unflatten(0, (num_blocks, layout.block_size)) for rows in plane]
            for plane in self.rows
        ]

    def memory(self, plane: int, layer: int) -> memoryview:
        """Writable bytes of all blocks of one layer, for the transfer path; they live as long as this cache."""
        blocks = self.layers[plane][layer]
        if blocks.device.type != "cpu":
            raise NotYet(f"transfer memory on {blocks.device.type}")
        return blocks.view(torch.uint8).numpy().reshape(-1).data
