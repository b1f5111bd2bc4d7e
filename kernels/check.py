"""What a launch wrapper refuses before a kernel sees an address. Every message names the argument and both values."""

import torch
from torch import Tensor


def require(name: str, tensor: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """Raises ValueError unless `tensor` has this shape (None: any size) and one of these dtypes."""
    fits = tensor.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")


def require_rows(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the last dimension is contiguous and rows begin at multiples of 16 bytes."""
    size = tensor.element_size()
    if tensor.stride(-1) != 1 or any(stride * size % 16 for stride in tensor.stride()[:-1]):
        raise ValueError(f"{name} has strides {tensor.stride()}: rows must be contiguous, 16 bytes aligned")
    if tensor.data_ptr() % 16:
        raise ValueError(f"{name} begins at {tensor.data_ptr():#x}, which is no multiple of 16 bytes")


def require_contiguous(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, not those of a contiguous {tuple(tensor.shape)}")


def require_power_of_two(name: str, value: int, least: int = 16) -> None:
    """Raises ValueError unless `value` is a power of two of at least `least`."""
    if value < least or value & (value - 1):
        raise ValueError(f"{name} is {value}, not a power of two of at least {least}")
