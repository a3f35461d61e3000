"""The shard of a researcher's own script: ``accelerate launch`` decides over how many processes latents are shared."""

import atexit
import os

import torch.distributed as dist

from scale_sae import topology
from scale_sae.collectives import Shard


def repeat_sums() -> None:
    """Makes cuBLAS add in the same order in every run, if CUDA has not started yet."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def launched_shard() -> Shard:
    """This process's shard where all processes of a launch share the latents of each SAE; ``Shard()`` without one.

    Joins the processes at its first call, unless the script has done so (``torch.distributed.init_process_group``,
    accelerate); all of them must call it. "cuda" is then each process's own GPU.
    """
    repeat_sums()
    rank, world_size, local_rank = topology.world_from_environment()
    if world_size > 1:
        _, backend = topology.pick_device(local_rank)
        if not dist.is_initialized():
            topology.connect(rank, world_size, backend)
            atexit.register(_part)
    if not dist.is_initialized():
        return Shard()
    return Shard(dist.get_rank(), dist.get_world_size())


def _part() -> None:
    """Ends the group's threads while Python still stands: at its end they may abort the process, or NCCL complains."""
    if dist.is_initialized():
        dist.destroy_process_group()
