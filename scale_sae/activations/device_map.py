"""How one rank spreads a model over its devices: accelerate's big-model inference, for models of any kind.

Whole layers go to one GPU after the other, so activations cross from GPU to GPU a few times per forward. What fits on
no GPU is kept in RAM, then on disk, and is read for every forward.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from scale_sae.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 1 << 30
# Of the memory that is free, the share that weights may take: activations need some too.
SHARE = 0.9

# Bytes of weights that each device holds at most: GPUs by their numbers, and "cpu".
MaxMemory = dict[int | str, int]


def max_memory(devices: Sequence[torch.device], limit_gib: float | None, processes: int) -> MaxMemory:
    """What transformers' ``from_pretrained(max_memory=...)`` takes, for a rank with these devices.

    Args:
        devices: the rank's: GPUs, or the CPU alone.
        limit_gib: most GiB per GPU, or of RAM where there is none; None: what is free.
        processes: of the run on this machine, which share its RAM.
    """
    import psutil  # type: ignore[import-untyped]

    ram = int(psutil.virtual_memory().available * SHARE / processes)
    limit = None if limit_gib is None else int(limit_gib * GIB)
    if devices[0].type == "cpu":
        return {"cpu": ram if limit is None else min(ram, limit)}
    found: MaxMemory = {}
    for device in devices:
        free = int(torch.cuda.mem_get_info(device)[0] * SHARE)
        found[device.index] = free if limit is None else min(free, limit)
    return {**found, "cpu": ram}


def check_device_map(network: "PreTrainedModel", name: str) -> None:
    """``UserError`` for a model that does not say which of its modules must stay on one device; reads no weights."""
    if not network._no_split_modules:
        raise UserError(
            f"topology.lm.parallel: device_map, but {name} ({type(network).__name__}) does not say which of its "
            "modules must stay on one device (_no_split_modules); use topology.lm.parallel: tp"
        )


def bytes_off_device(network: "PreTrainedModel") -> tuple[int, int]:
    """(bytes of weights that are read from RAM or disk for every forward, bytes of all weights).

    Accelerate leaves parameters without storage (on the meta device) in the model for these.
    """
    parameters = list(network.parameters())
    return sum(p.nbytes for p in parameters if p.is_meta), sum(p.nbytes for p in parameters)
