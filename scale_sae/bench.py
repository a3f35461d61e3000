"""Measures the training step of a config on random rows: ``python -m scale_sae.bench --config C.yaml [--steps N]``.

Or under ``accelerate launch``, with as many processes as the SAEs' part of the topology has, of one group: no language
model runs, so that its part is left out. Any key of the config may follow, dotted, as for ``scale_sae.train``.

One table, a line for the whole step (chunk into the buffer, batch out of it, every SAE of the group in turns) and one
for the step of each SAE alone, all measured in turns, medians over ``--steps`` rounds:

- *floor*: what this rank's share of the work cannot go below on this machine, measured in the same rounds into memory
  that is already there: the encoder's product (``torch.mm``), the choice among its results (``torch.topk``), fused Adam
  over the matrices whose moments this rank owns. *x floor* is the step over their sum.
- *link MiB*: what a rank has to do with per step on the tensor-parallel (tp) and data-parallel (dp) links, counted at
  the collectives. Of an all-gather it is all that the rank ends up with, of a reduce-scatter all that it begins with,
  of an all-reduce twice its tensor.

Below it the rank's memory: the most that tensors had at once in a whole step whose SAEs came one after the other, and
how much of it is there between steps.
"""

import json
import math
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae import topology
from scale_sae.activations.schedule import schedule
from scale_sae.activations.transport import ReceivedChunk
from scale_sae.config import RunConfig
from scale_sae.engine_settings import check_jobs, deepspeed_settings
from scale_sae.errors import UserError
from scale_sae.job_trainer import JobTrainer
from scale_sae.jobs import resolve
from scale_sae.profiling import peak_memory
from scale_sae.train import agree, read_config, set_tf32
from scale_sae.trainer import Trainer

WARM_UP = 3
NEVER = 10**12
MIB = 2**20


# ---- a trainer without a language model ------------------------------------------------------------------------------


class RandomRows:
    """An endless stream of the same chunk of random rows, as many of it for this rank as its lanes take."""

    def __init__(self, trainer: Trainer, rows: int):
        buffer = trainer.buffer
        most = trainer.schedule.most_rows(len(buffer.lanes))
        self.count = rows
        self.rows = {name: torch.randn_like(held.flatten(0, 1)[:most]) for name, held in buffer.rows.items()}
        self.chunks = 0

    def next_chunk(self) -> ReceivedChunk:
        self.chunks += 1
        return ReceivedChunk(self.chunks - 1, (self.chunks - 1) * self.count, self.count, self.rows, {})

    def close(self) -> None:
        """Nothing is held."""


def trainer_of(
    run: RunConfig, rank: int, device: torch.device, backend: str, store: dist.Store
) -> tuple[Trainer, RandomRows]:
    """This rank's trainer of a colocated run, and random rows in chunks of one batch."""
    widths, specs = resolve(run)
    check_jobs(run.topology, specs)
    planned = topology.plan(run.topology, [spec.planned for spec in specs], run.buffer.lanes)
    place = topology.build(planned, rank, device, backend, store, deepspeed_settings(run.topology, os.environ))
    sizes = schedule(run, 1)
    sizes = replace(sizes, chunk_rows=sizes.batch)
    trainer = Trainer(run, specs, widths, sizes, place, getattr(torch, run.model.dtype))
    return trainer, RandomRows(trainer, sizes.batch)


# ---- bytes on the links ----------------------------------------------------------------------------------------------


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


# Of ProcessGroup's calls, which torch renames now and then: bytes of (its arguments).
COUNTED: dict[str, Callable[..., int]] = {
    "allreduce": lambda tensors, *rest: 2 * _bytes(tensors),
    **dict.fromkeys(("allgather", "all_gather_single", "_allgather_base"), lambda output, *rest: _bytes(output)),
    **dict.fromkeys(("reduce_scatter_single", "_reduce_scatter_base"), lambda output, whole, *rest: _bytes(whole)),
    **dict.fromkeys(("send", "recv", "broadcast"), lambda tensors, *rest: _bytes(tensors)),
}


@contextmanager
def counted_bytes(links: Mapping[str, str]) -> Iterator[Counter[str]]:
    """While open, counts what this rank's collectives move: link → bytes. ``links``: name of a process group → link."""
    found: Counter[str] = Counter()
    # As they stand in the class: what `getattr` gives is no longer bound to a group.
    originals = {name: vars(dist.ProcessGroup)[name] for name in COUNTED if name in vars(dist.ProcessGroup)}

    def counting(name: str, group: dist.ProcessGroup, *args: Any, **keys: Any) -> Any:
        if group.group_name in links:
            found[links[group.group_name]] += COUNTED[name](*args)
        return originals[name].__get__(group)(*args, **keys)

    for name in originals:
        # A function: a `partial` would not be bound to the group.
        setattr(dist.ProcessGroup, name, lambda group, *args, _name=name, **keys: counting(_name, group, *args, **keys))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)


# ---- the floor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """This rank's share of an SAE's step. ``k`` is 0 where nothing is chosen; ``owned``: the matrices Adam updates."""

    rows: int
    d_in: int
    latents: int
    k: int
    dtype: torch.dtype
    owned: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, job: JobTrainer, rows: int) -> "Sizes":
        k = min(math.ceil(getattr(job.spec.cfg, "k", 0)), job.sae.n_local)
        owned = tuple(tuple(p.shape) for p in job.engine.parameters.values() if p.dim() > 1)
        return cls(rows, job.spec.cfg.d_in, job.sae.n_local, k, job.sae.dtype, owned)


class Floor:
    """The parts that any TopK step has, on their own."""

    def __init__(self, sizes: Sizes, device: torch.device):
        x = torch.randn(sizes.rows, sizes.d_in, device=device).to(sizes.dtype)
        weight = torch.randn(sizes.d_in, sizes.latents, device=device).to(sizes.dtype)
        out = torch.empty(sizes.rows, sizes.latents, dtype=sizes.dtype, device=device)
        wide = torch.promote_types(sizes.dtype, torch.float32)
        matrices = [torch.zeros(shape, dtype=wide, device=device) for shape in sizes.owned]
        for matrix in matrices:
            matrix.grad = torch.randn_like(matrix)
        self.parts: dict[str, Callable[[], Any]] = {"GEMM": partial(torch.mm, x, weight, out=out)}
        if sizes.k:
            shape = (sizes.rows, sizes.k)
            chosen = out.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=device)
            self.parts["selection"] = partial(torch.topk, out, sizes.k, sorted=False, out=chosen)
        if matrices:
            self.parts["Adam"] = torch.optim.Adam(matrices, fused=True).step


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """One rank's trainer on random rows, and what is measured of it."""

    def __init__(self, run: RunConfig, rank: int, device: torch.device, backend: str, store: dist.Store):
        self.device = device
        with peak_memory(device) as memory:
            self.trainer, self.stream = trainer_of(run, rank, device, backend, store)
            in_turns, self.trainer.interleaver.run = self.trainer.interleaver.run, _one_by_one  # type: ignore
            self.whole_step()
            memory.restart()
            self.whole_step()
        self.trainer.interleaver.run = in_turns  # type: ignore[method-assign]
        self.peak = memory.bytes
        batch = run.train.train_batch_size_tokens
        self.rows = batch // run.topology.sae.dp
        widths = {name: held.shape[2] for name, held in self.trainer.buffer.rows.items()}
        dtype = getattr(torch, run.model.dtype)
        self.x = {name: torch.randn(self.rows, width, device=device).to(dtype) for name, width in widths.items()}
        self.batch = batch
        self.steps_alone = 1

    def whole_step(self) -> None:
        self.trainer.advance(self.stream)

    def step_alone(self, job: JobTrainer) -> None:
        # Past those of a run's start, and never one that logs.
        self.steps_alone += 1
        job.step(self.x[job.spec.hookpoint], self.x[job.spec.target], self.batch, self.steps_alone, False)

    def measure(self, rounds: int) -> dict[str, Any]:
        """What the table says: seconds, bytes."""
        jobs = {job.spec.sae_id: job for job in self.trainer.jobs}
        sizes = {sae_id: Sizes.of(job, self.rows) for sae_id, job in jobs.items()}
        floors = {size: Floor(size, self.device) for size in sizes.values()}
        timed: dict[Any, Callable[[], Any]] = {"step": self.whole_step}
        timed |= {sae_id: partial(self.step_alone, job) for sae_id, job in jobs.items()}
        timed |= {(size, name): part for size, floor in floors.items() for name, part in floor.parts.items()}
        times: dict[Any, list[float]] = {name: [] for name in timed}
        for number in range(WARM_UP + rounds):
            for name, call in timed.items():
                times[name].append(self._seconds(call))
                if number < WARM_UP:
                    times[name].clear()
        medians = {name: statistics.median(values) for name, values in times.items()}
        links = self._links()
        found: dict[str, Any] = {
            sae_id: {
                "seconds": medians[sae_id],
                "floor": {name: medians[sizes[sae_id], name] for name in floors[sizes[sae_id]].parts},
                "link_bytes": self._moved(timed[sae_id], links),
            }
            for sae_id in jobs
        }
        of_all: Counter[str] = Counter()
        for values in found.values():
            of_all.update(values["floor"])
        step = {"seconds": medians["step"], "floor": dict(of_all), "link_bytes": self._moved(self.whole_step, links)}
        return {"step": step, "saes": found, "memory_bytes": self._memory()}

    def _seconds(self, call: Callable[[], Any]) -> float:
        dist.barrier(self.trainer.control)
        begun = self._now()
        call()
        return self._now() - begun

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _links(self) -> dict[str, str]:
        shard = self.trainer.topology.shard
        return {ranks.group.group_name: name for ranks, name in ((shard, "tp"), (shard.dp, "dp")) if ranks.group}

    @staticmethod
    def _moved(call: Callable[[], Any], links: Mapping[str, str]) -> dict[str, int]:
        with counted_bytes(links) as found:
            call()
        return {name: found[name] for name in links.values()}

    def _memory(self) -> dict[str, int]:
        state: Counter[str] = Counter()
        for job in self.trainer.jobs:
            tensors = {**job.row_tensors(), **job.replicated_tensors()}
            for name, tensor in tensors.items():
                state["adam" if name.startswith("adam.") else "parameters"] += tensor.nbytes
            state["parameters"] += sum(tensor.nbytes for tensor in job.engine.narrow.values())
        rows = [*self.trainer.buffer.rows.values(), *self.stream.rows.values()]
        stream = sum(tensor.nbytes for tensor in rows)
        found = {"peak": self.peak, "parameters": state["parameters"], "adam": state["adam"], "stream": stream}
        return {**found, "rest": self.peak - stream - sum(state.values())}


def _one_by_one(tasks: Sequence[Callable[[], Any]], expected: type[Exception]) -> list[Any]:
    """In the place of ``Interleaver.run``: the memory of a CPU is counted in one thread."""
    return [task() for task in tasks]


# ---- the command -----------------------------------------------------------------------------------------------------


def where(device: torch.device, ranks: int) -> dict[str, Any]:
    """What the figures are of: machine and versions."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def lines(found: dict[str, Any], batch: int) -> Iterator[str]:
    """The table and what stands below it."""
    parts = ("GEMM", "selection", "Adam")
    links = list(found["step"]["link_bytes"])
    heads = ["", "ms", "tokens/s", *(f"{part} ms" for part in parts), "x floor", *(f"{link} MiB" for link in links)]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for name, values in {"whole step": found["step"], **found["saes"]}.items():
        floor = values["floor"]
        cells = [name, f"{values['seconds'] * 1e3:.2f}", f"{batch / values['seconds']:.0f}"]
        cells += [f"{floor[part] * 1e3:.2f}" if part in floor else "" for part in parts]
        cells += [f"{values['seconds'] / sum(floor.values()):.2f}"]
        cells += [f"{values['link_bytes'][link] / MIB:.3f}" for link in links]
        yield f"| {' | '.join(cells)} |"
    mib = {name: f"{value / MIB:.1f}" for name, value in found["memory_bytes"].items()}
    yield (
        f"memory of a rank at its peak: {mib['peak']} MiB, of them parameters {mib['parameters']}, Adam {mib['adam']}, "
        f"buffer and random rows {mib['stream']}, the step's own {mib['rest']}"
    )


def _config(path: object, extra: tuple[object, ...], overrides: dict[str, Any], world: int) -> RunConfig:
    """The config without its language model's ranks. ``UserError`` for a wrong one, or too few or many processes."""
    fixed = {"topology.lm": "colocated", "train.training_tokens": NEVER, "logging.log_every_steps": NEVER}
    run = read_config(path, extra, {**overrides, **fixed})
    if run.topology.sae.groups != 1:
        raise UserError(
            f"topology.sae.groups: {run.topology.sae.groups}, but groups exchange nothing; measure one, with "
            "--topology.sae.groups=1 and the SAEs that it would have"
        )
    needed = run.topology.sae_ranks
    if needed != world:
        raise UserError(
            f"topology.sae: needs {needed} ranks but {world} were started; start it with: accelerate launch "
            f"{'--multi_gpu ' if needed > 1 else ''}--num_processes {needed} -m scale_sae.bench --config {path}"
        )
    return run


def _check_options(steps: object, json_path: object) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise UserError(f"--steps: {steps!r} is no number of steps; give a whole number from 1")
    if json_path is not None and not (isinstance(json_path, str) and Path(json_path).absolute().parent.is_dir()):
        raise UserError(f"--json: {json_path!r} is no file in a folder that exists; name one")


def run(path: object, extra: tuple[object, ...], steps: int, json_path: str | None, overrides: dict[str, Any]) -> int:
    """Measures and prints; returns this rank's exit code."""
    rank, world, local_rank = topology.world_from_environment()
    # As in training: another order of cuBLAS's sums may be faster.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device, backend = topology.pick_device(local_rank)
    store = topology.connect(rank, world, backend)
    try:
        agree(lambda: _check_options(steps, json_path))
        config = agree(lambda: _config(path, extra, overrides, world))
        set_tf32(config.train.allow_tf32)
        bench = agree(lambda: Bench(config, rank, device, backend, store))
        found = bench.measure(steps)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist.destroy_process_group()
        return 1
    if rank == 0:
        said = {**where(device, world), "config": str(path), "steps": steps, "batch": bench.batch}
        print(" ".join(f"{name}={value}" for name, value in said.items()))
        print("\n".join(lines(found, bench.batch)), flush=True)
        if json_path is not None:
            Path(json_path).write_text(json.dumps({**said, **found}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


def main(config: str | None = None, *extra: object, steps: int = 10, json: str | None = None, **overrides: Any) -> None:
    """Measures the training step of a config on random rows.

    Args:
        config: the YAML file of the run.
        steps: rounds of measurement; figures are their medians.
        json: a file to write the figures to as well, in seconds and bytes.
        overrides: any key of the config, dotted: --saes.0.k=64 --topology.sae.tp=4
    """
    sys.exit(run(config, extra, steps, json, overrides))


if __name__ == "__main__":
    fire.Fire(main)
