"""Memory for large results that are used up before the next is asked for."""

import threading

import torch
from torch import Tensor

_kept = threading.local()  # of a thread: its buffer as bytes


def take(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[rows, columns]`` with anything in it. The same memory as the last one that this thread took, where it fits.

    The C library hands a large block back to the system when it is freed, and a new one costs as much as a product that
    fills it. CUDA's allocator keeps its blocks.
    """
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=dtype, device=device)
    wanted = rows * columns * dtype.itemsize
    held: Tensor | None = getattr(_kept, "bytes", None)
    if held is None or len(held) < wanted:
        _kept.bytes = None  # freed first
        _kept.bytes = held = torch.empty(wanted, dtype=torch.uint8)
    return held[:wanted].view(dtype).view(rows, columns)
