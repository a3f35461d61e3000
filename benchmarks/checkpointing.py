"""What checkpoints cost: the step rate with one every so many steps against none, and the stall of each.

    python benchmarks/checkpointing.py --config configs/quickstart.yaml --every 50 --topology.sae.tp 1

or under ``accelerate launch --num_processes N`` with ``--topology.sae.tp N``; no rank runs a language model. One run in
four phases of ``--steps`` steps: warm-up, no checkpoints, checkpoints in the background, checkpoints that training
waits for. Rows are random numbers. Any key of the config may follow, dotted. ``output_dir`` is a new folder inside
``--folder`` and deleted at the end: name a folder on the disk that runs use.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch
import torch.distributed as dist

from scale_sae import config, topology
from scale_sae.bench import RandomRows, trainer_of
from scale_sae.trainer import Trainer


def phase(trainer: Trainer, stream: RandomRows, steps: int, every: int | None, wait: bool) -> dict[str, Any]:
    """Trains ``steps`` steps; their rate and the seconds for which each checkpoint kept training from going on."""
    device, stalls = trainer.topology.device, []

    def settle() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    dist.barrier(trainer.topology.sae_control)
    begun = settle()
    for step in range(1, steps + 1):
        trainer.advance(stream)
        if every and step % every == 0:
            before = settle()
            trainer.save()
            if wait:
                trainer.snapshots.wait()
            stalls.append(settle() - before)
    seconds = settle() - begun
    trainer.snapshots.wait()
    return {"steps_per_second": steps / seconds, "stall_seconds": stalls}


def main(config_path: str, every: int, steps: int, folder: str, overrides: dict[str, Any]) -> None:
    rank, world_size, local_rank = topology.world_from_environment()
    device, backend = topology.pick_device(local_rank)
    store = topology.connect(rank, world_size, backend)
    made = [tempfile.mkdtemp(dir=folder) if rank == 0 else ""]
    dist.broadcast_object_list(made, 0)
    tokens = {"train.training_tokens": 10**12, "output_dir": made[0], "checkpoint.every_steps": every}
    run = config.load(config_path, {"topology.lm": "colocated", **overrides, **tokens})
    topology.check_world_size(run.topology, world_size, config_path)
    trainer, stream = trainer_of(run, rank, device, backend, store)
    try:
        phase(trainer, stream, steps, every, wait=False)  # also makes the memory for the copies
        found = {
            "none": phase(trainer, stream, steps, None, wait=False),
            "in the background": phase(trainer, stream, steps, every, wait=False),
            "waited for": phase(trainer, stream, steps, every, wait=True),
        }
    finally:
        if rank == 0:
            files = Path(made[0]).glob("checkpoints/step_*/**/*.safetensors")
            size = sum(path.stat().st_size for path in files) // max(1, len(list(Path(made[0]).glob("checkpoints/*"))))
            shutil.rmtree(made[0])
    if rank == 0:
        for name, values in found.items():
            stalls = values.pop("stall_seconds")
            if stalls:
                values |= {"stall_seconds_median": statistics.median(stalls), "stall_seconds_worst": max(stalls)}
                values["share_of_rate_without"] = values["steps_per_second"] / found["none"]["steps_per_second"]
            print(json.dumps({"checkpoints": name, **values}))
        print(json.dumps({"bytes_per_checkpoint": size, "every_steps": every, "ranks": world_size}))
    dist.barrier()
    dist.destroy_process_group()


def command(config: str, every: int = 50, steps: int = 200, folder: str = ".", **overrides: Any) -> None:
    """Measures; ``overrides`` are keys of the config, dotted, as for ``scale_sae.train``."""
    main(config, every, steps, folder, overrides)


if __name__ == "__main__":
    fire.Fire(command)
