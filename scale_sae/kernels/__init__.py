"""Numerical kernels.

``plain`` says in torch what each does, on any device. ``fused`` has the same functions as Triton kernels for NVIDIA
GPUs, which pass over the large tensors once. ``on`` chooses, at each call, by the device of a tensor.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from scale_sae.kernels import plain


def on(tensor: Tensor) -> ModuleType:
    """The module whose functions work on tensors like this one: ``fused`` or ``plain``."""
    if tensor.is_cuda and tensor.dtype is not torch.float64 and _has_triton():
        import scale_sae.kernels.fused as fused  # needs triton

        return fused
    return plain


@cache
def _has_triton() -> bool:
    return torch.version.hip is None and find_spec("triton") is not None
