"""What it is worth that the messages of one SAE pass while another computes: step times with and without, in one run.

    python -m torch.distributed.run --nproc_per_node 2 benchmarks/overlap.py --config configs/quickstart.yaml

``--saes`` SAEs of the config's first entry train at its first hookpoint, under ``topology.sae.tp`` = the number of
processes where nothing else is said; no rank runs a language model, rows are random numbers. Blocks of ``--steps``
steps in turns and one after the other alternate ``--pairs`` times, so that both see the same weather. Any key of the
config may follow, dotted.

The gain is what the link takes, so try it on a slow one too. Linux limits the loopback's rate, for a start:

    unshare --net bash -c 'ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 100kb latency 1s && …'
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import fire
import torch
import torch.distributed as dist

from scale_sae import config, topology
from scale_sae.bench import RandomRows, trainer_of
from scale_sae.trainer import Trainer


def one_by_one(tasks: Sequence[Callable[[], Any]], expected: type[Exception]) -> list[Any]:
    """In the place of ``Interleaver.run``."""
    return [task() for task in tasks]


def block(trainer: Trainer, stream: RandomRows, steps: int) -> tuple[float, float]:
    """(milliseconds per step, those of this rank's processors' time)."""
    device = trainer.topology.device
    dist.barrier(trainer.topology.sae_control)
    begun, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        trainer.advance(stream)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier(trainer.topology.sae_control)
    return (time.perf_counter() - begun) / steps * 1e3, (time.process_time() - used) / steps * 1e3


def main(path: str, saes: int, steps: int, pairs: int, overrides: dict[str, Any]) -> None:
    rank, world_size, local_rank = topology.world_from_environment()
    device, backend = topology.pick_device(local_rank)
    store = topology.connect(rank, world_size, backend)
    with tempfile.TemporaryDirectory() as folder:
        fixed = {
            "topology.lm": "colocated",
            "topology.sae.tp": world_size,
            **overrides,
            "output_dir": folder,
            "train.training_tokens": 10**12,
            "logging.log_every_steps": 10**9,
        }
        run = config.to_dict(config.load(path, fixed))
        run["hookpoints"] = run["hookpoints"][:1]
        run["saes"] = [{**run["saes"][0], "name": f"s{number}", "hookpoints": None} for number in range(saes)]
        made = config.from_dict(run)
        trainer, stream = trainer_of(made, rank, device, backend, store)
        in_turns = trainer.interleaver.run
        times: dict[str, list[tuple[float, float]]] = {"in turns": [], "one by one": []}
        block(trainer, stream, 3)
        for _ in range(pairs):
            for name, blocks in times.items():
                trainer.interleaver.run = in_turns if name == "in turns" else one_by_one  # type: ignore[method-assign]
                blocks.append(block(trainer, stream, steps))
    if rank == 0:
        for which, unit in enumerate(("ms per step", "ms of processor time per step")):
            found = {name: [both[which] for both in blocks] for name, blocks in times.items()}
            ratios = [a / b for a, b in zip(*found.values(), strict=True)]
            figures = {name: round(statistics.median(values), 2) for name, values in found.items()}
            spread = {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            spread = {name: round(value, 3) for name, value in spread.items()}
            print(json.dumps({"ranks": world_size, "saes": saes, "unit": unit, **figures, **spread}))
    dist.barrier()
    dist.destroy_process_group()


def command(config: str, saes: int = 4, steps: int = 10, pairs: int = 6, **overrides: Any) -> None:
    """Measures; ``overrides`` are keys of the config, dotted, as for ``scale_sae.train``."""
    main(config, saes, steps, pairs, overrides)


if __name__ == "__main__":
    fire.Fire(command)
