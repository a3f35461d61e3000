"""Runs the parts of a model through torch.compile and leaves the hookpoints between them as they are."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from scale_sae.activations.architecture import INPUT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules that only hold others; and those that are a single operation, which compiling makes no faster.
CONTAINERS = (nn.ModuleList, nn.ModuleDict)
SINGLE = (nn.Linear, nn.Embedding)


def compile_between(network: "PreTrainedModel", hookpoints: Iterable[str]) -> None:
    """Compiles, in place, the ``forward`` of the largest modules that have no hookpoint inside.

    A module's hooks are called around its ``forward``, so none of a hookpoint is ever in a compiled graph, which would
    not notice a hook that comes later, nor let one end the model's forward.
    """
    hooked = {hookpoint.removesuffix(INPUT) for hookpoint in hookpoints}

    def visit(name: str, module: nn.Module) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(module, CONTAINERS) or any(other.startswith(prefix) for other in hooked - {name}):
            for child_name, child in module.named_children():
                visit(f"{prefix}{child_name}", child)
        elif not isinstance(module, SINGLE):
            # A graph per shape, and none that timings decide about: equal inputs give equal bits on a later launch too.
            module.forward = torch.compile(module.forward, dynamic=False, options={"deterministic": True})

    visit("", network)


def is_compiler_error(error: Exception) -> bool:
    """Whether it says that something cannot be compiled, and not what the model itself raises."""
    return type(error).__module__.startswith(("torch._dynamo.", "torch._inductor."))
