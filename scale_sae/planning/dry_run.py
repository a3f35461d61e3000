"""A run's first step on every kind of rank, on tensors that have shapes and no values, in one process.

Each rank that differs from others is taken in turn: a world of which it is the only rank that exists, the process
groups of `topology.build`, then the code that trains. A rank of an SAE group receives chunks, puts their rows into its
buffer, draws a batch and trains each of its SAEs on it, with backward pass, Adam and what is logged. A rank of the
language model splits the model as in a run, captures chunks and sends their rows. What all of them say to each other is
noted and compared: calls that differ would leave ranks of the cluster waiting for each other.

Of groups that train alike the first is run, and of the copies of the language model the first, for all of them. Calls
are compared within each process group; whether ranks take the groups themselves in the same order is not.

Left out: what depends on values (AuxK, of which no latent is dead in the first step; non-finite rows), text, weights,
checkpoints and evaluations, and DeepSpeed, in whose place torch's ``fully_shard`` divides the SAEs. Code that reads a
value is answered: 1.0, of whole numbers 0, True of ``all`` and False of ``any``.
"""

import copy
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from scale_sae import engine_settings, topology
from scale_sae.activations import source as sources
from scale_sae.activations.architecture import build_architecture
from scale_sae.activations.source import ActivationSource
from scale_sae.activations.tokens import Chunk
from scale_sae.activations.transport import (
    ColocatedExchange,
    ReceivedChunk,
    Receiver,
    Sender,
    Start,
    kept_rows,
    pack_header,
)
from scale_sae.config import ModelConfig
from scale_sae.errors import UserError
from scale_sae.job_trainer import JobTrainer
from scale_sae.planning.calls import Call, Calls, misunderstandings
from scale_sae.planning.estimate import gigabytes
from scale_sae.planning.fake_tensors import META, Shapes, open_shapes, replaced
from scale_sae.planning.workload import Role, Workload
from scale_sae.saes import registry
from scale_sae.saes.batchtopk import BatchTopKTrainingSAE
from scale_sae.topology import Topology
from scale_sae.trainer import Stream, Trainer

TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class RankRun:
    """One distinct rank that was run.

    Attributes:
        role: what it runs: "SAE", "LM" or "SAE+LM".
        rank: its number.
        stands_for: how many ranks do the same, this one among them.
        peak: most bytes that tensors on its device had at once, the weights of a language model too. Of an SAE rank on
            a GPU: kernels need no memory of their own.
    """

    role: str
    rank: int
    stands_for: int
    peak: int


@dataclass(frozen=True)
class DryRun:
    """What `dry_run` found. It succeeded if there is no problem.

    Attributes:
        ranks: the distinct ranks, ascending.
        problems: one line each.
    """

    ranks: tuple[RankRun, ...]
    problems: tuple[str, ...]


def dry_run(w: Workload, say: Callable[[str], None], gpus_per_node: int | None = None) -> DryRun:
    """Runs one step of every distinct rank of ``w``. Raises nothing that a rank does: it is among the problems.

    Args:
        w: the run.
        say: told in one line of each kind of rank that was run.
        gpus_per_node: None: problems name ranks and no nodes.
    """

    if w.config.topology.lm.parallel == "device_map":
        gpus_per_node = None  # a rank has several devices, so a node has fewer ranks

    def name(rank: int) -> str:
        return f"rank {rank}" + ("" if gpus_per_node is None else f" (node {rank // gpus_per_node})")

    runs: list[RankRun] = []
    found: dict[int, list[Call]] = {}
    model_of: dict[int, int] = {}
    problems: list[str] = []
    for role in w.roles():
        failed: dict[str, list[int]] = {}
        alike = _alike(w, role)
        begun = time.perf_counter()
        for rank, ranks in alike.items():
            model_of |= dict.fromkeys(ranks, rank)
            run, calls, problem = _run_rank(w, role, rank, len(ranks))
            runs.append(run)
            if problem is None:
                found[rank] = calls
            else:
                failed.setdefault(problem, []).extend(ranks)
        problems += [f"{role.kind} {_named(sorted(ranks), name)}: {problem}" for problem, ranks in failed.items()]
        how = "run" if len(alike) == len(role.ranks) else f"{len(alike)} of them run for all"
        peak = gigabytes(max(run.peak for run in runs[-len(alike) :]))
        said = f"{role}: {how}, {peak} at most, {time.perf_counter() - begun:.1f} s"
        say(said + (f", {sum(map(len, failed.values()))} fail" if failed else ""))
    problems += misunderstandings(found, model_of, name)
    return DryRun(tuple(sorted(runs, key=lambda run: run.rank)), tuple(problems))


def _named(ranks: list[int], name: Callable[[int], str]) -> str:
    return name(ranks[0]) + (f" and {len(ranks) - 1} more" if len(ranks) > 1 else "")


def _alike(w: Workload, role: Role) -> dict[int, list[int]]:
    """Rank that is run → the ranks of the role that it stands for, itself among them.

    The same place in each group, or copy of the language model. Of many dp ranks the first and the last are run: those
    between have as many rows and latents as the first. A class of one's own may do anything, so all are.
    """
    if role.group is None:
        tp = len(w.plan.lm[0])
        return {role.ranks[place]: list(role.ranks[place::tp]) for place in range(tp)}
    dp, tp = role.group.dp, role.group.tp
    is_custom = any(registry.is_custom(spec.architecture) for spec in w.jobs_of(role.group))
    found: dict[int, list[int]] = {}
    for place in range(dp * tp):
        p, t = divmod(place, tp)
        model = place if is_custom or p in (0, dp - 1) else t
        found.setdefault(role.ranks[model], []).extend(role.ranks[place :: dp * tp])
    return found


def _run_rank(w: Workload, role: Role, rank: int, stands_for: int) -> tuple[RankRun, list[Call], str | None]:
    """What a rank did, what it called and, where it failed, why."""
    calls: list[Call] = []
    shapes = Shapes()
    problem = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about a world that does not exist
        try:
            with topology.fake_world(rank, w.plan.world_size) as store:
                settings = engine_settings.deepspeed_settings(w.config.topology, os.environ)
                # DeepSpeed, which computes, is none to try without values; fully_shard divides the same.
                plan = w.plan if settings is None else replace(w.plan, engine="fsdp2")
                place = topology.build(plan, rank, META, "fake", store)
                noted = Calls(place)
                calls = noted.found
                shapes.collective = noted.note
                with open_shapes(shapes), noted.instead(_Headers(w).fill):
                    (_step_lm if role.group is None else _step_saes)(w, place, shapes)
        except UserError as error:
            problem = str(error)
        except Exception as error:
            problem = _told(error)
    return RankRun(role.kind, rank, stands_for, shapes.peak), calls, problem


def _told(error: Exception) -> str:
    """Type, innermost place in what a run runs but for torch, and first line of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in frames if not Path(frame.filename).is_relative_to(TORCH)]
    frame = ([frame for frame in others if Path(frame.filename).parent != Path(__file__).parent] or others)[-1]
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__} at {frame.filename}:{frame.lineno} in {frame.name}: {line}"


# ---- the ranks -------------------------------------------------------------------------------------------------------


class _Trainer(Trainer):
    """A trainer on rows without values, of which one is left out as far as memory goes."""

    def _batches(
        self, rows: Mapping[str, Tensor], usable: Mapping[str, Tensor]
    ) -> dict[tuple[str, str], tuple[Tensor, Tensor, int]]:
        dp, batches = self.topology.shard.dp, {}
        for source, target in dict.fromkeys((job.spec.hookpoint, job.spec.target) for job in self.jobs):
            mask = (usable[source] & usable[target]).view(dp.size, -1)[dp.rank]
            x = rows[source][mask]
            batches[source, target] = x, x if source == target else rows[target][mask], self.schedule.batch
        return batches


def _step_saes(w: Workload, place: Topology, shapes: Shapes) -> None:
    """The first step of an SAE rank, from the last chunk that it waits for."""
    trainer = _Trainer(w.config, w.specs, w.widths, w.schedule, place, w.dtype)
    for job in trainer.jobs:
        _limit(job, shapes, w.batch // place.shard.dp.size, w.batch)
    # As if all chunks but the last had been inserted: what a lane holds is arithmetic.
    start = _start(w)
    trainer.buffer.inserted, trainer.chunks_inserted = start.rows, start.chunk
    trainer.advance(_stream(w, place, start, shapes))


def _limit(job: JobTrainer, shapes: Shapes, rows: int, batch: int) -> None:
    """Of an SAE with k active latents per row, no mask of this rank's ``rows`` of a ``batch`` has more that count."""
    step, k = job.step, getattr(job.spec.cfg, "k", None)
    # BatchTopK may find all that the whole batch keeps on one rank.
    most = None if k is None else int(k * (batch if isinstance(job.sae, BatchTopKTrainingSAE) else rows))

    def limited(*args: Any) -> Any:
        shapes.most = most
        try:
            return step(*args)
        finally:
            shapes.most = None

    job.step = limited  # type: ignore[method-assign,assignment]


def _stream(w: Workload, place: Topology, start: Start, shapes: Shapes) -> Stream:
    """Where this rank's chunks come from, as in a run."""
    if w.config.topology.lm.cache is not None:
        return _CachedRows(w, place, start)
    if not w.plan.colocated:
        return Receiver(place, w.widths, w.schedule, w.dtype, start)
    source = _source(w, None, shapes)
    return ColocatedExchange(place, w.widths, w.schedule, w.dtype, start, _chunks(w, start.chunk), source)


def _step_lm(w: Workload, place: Topology, shapes: Shapes) -> None:
    """What an LM rank does for one chunk while two are on their way."""
    source = _source(w, place.lm_mesh, shapes)
    sender = Sender(place, w.widths, w.schedule, w.dtype)
    count, chunks = w.rows_per_chunk, _chunks(w, 0)
    for chunk in (next(chunks), next(chunks)):
        before = {name: torch.empty(count, width, dtype=w.dtype, device=META) for name, width in w.widths.items()}
        sender.send(chunk.index, chunk.index * count, count, before, chunk.cursor)
        del before
    chunk = next(chunks)
    sender.send(chunk.index, chunk.index * count, count, kept_rows(source, chunk, META), chunk.cursor)


def _source(w: Workload, mesh: DeviceMesh | None, shapes: Shapes) -> ActivationSource:
    """The model without weights, split as in a run. It is read and cut on the host: a device gets its own part."""
    with shapes.elsewhere(), replaced(sources, "_load", _weightless):
        source = ActivationSource(w.config.model, w.widths, META, mesh)
    parts = {id(part): part for part in (*source.model.parameters(), *source.model.buffers())}
    shapes.add(sum((part.to_local() if isinstance(part, DTensor) else part).nbytes for part in parts.values()))
    return source


def _start(w: Workload) -> Start:
    """Where the stream stands when one chunk is missing for the first draw."""
    chunks = -(-w.schedule.rows_before_draw(0) // w.rows_per_chunk) - 1
    return Start(chunks, chunks * w.rows_per_chunk)


def _chunks(w: Workload, first: int) -> Iterator[Chunk]:
    """Chunks of as many rows as one can give, from number ``first`` on."""
    data, model = w.config.data, build_architecture(w.config.model)
    shape = (data.chunk_contexts, data.context_size)
    tokens = torch.zeros(shape, dtype=torch.int64)
    keep = torch.zeros(shape, dtype=torch.bool)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        tokens = torch.zeros(data.chunk_contexts, model.config.num_channels, height, width)
        keep = torch.ones(data.chunk_contexts, w.positions, dtype=torch.bool)
    else:
        keep[:, slice(*data.seqpos_slice)] = True
        keep[:, 0] &= int(keep.sum()) == w.rows_per_chunk  # else the BOS gives none
    assert int(keep.sum()) == w.rows_per_chunk
    while True:
        yield Chunk(first, tokens, keep, {})
        first += 1


class _Headers:
    """What an SAE rank receives before each chunk."""

    def __init__(self, w: Workload):
        self.w, self.start = w, _start(w).chunk
        self.sent: Counter[int] = Counter()

    def fill(self, tensor: Tensor, peer: int) -> None:
        """Writes the next header of LM rank ``peer`` into a tensor of the host; rows have no values."""
        if tensor.is_meta:
            return
        replica, replicas = self.w.plan.replica_of(peer), len(self.w.plan.lm)
        assert replica is not None
        chunk = self.start + (replica - self.start) % replicas + replicas * self.sent[peer]
        self.sent[peer] += 1
        rows = self.w.rows_per_chunk
        tensor.copy_(pack_header(chunk, chunk * rows, rows, False, {}))


class _CachedRows:
    """Chunks of a run from cached activations, without the cache."""

    def __init__(self, w: Workload, place: Topology, start: Start):
        assert place.group is not None
        self.w, self.next = w, start.chunk
        most = w.schedule.most_rows(len(w.plan.lane_block(place.group, place.rank)))
        self.sizes = {name: (most, w.widths[name]) for name in place.group.hookpoints}

    def next_chunk(self) -> ReceivedChunk:
        rows = {name: torch.empty(size, dtype=self.w.dtype, device=META) for name, size in self.sizes.items()}
        self.next += 1
        count = self.w.rows_per_chunk
        return ReceivedChunk(self.next - 1, (self.next - 1) * count, count, rows, {})

    def close(self) -> None:
        """Nothing is held."""


def _weightless(model: ModelConfig, dtype: torch.dtype, **placing: Any) -> Any:
    """In the place of ``from_pretrained``: the same modules on the meta device."""
    network = copy.deepcopy(build_architecture(model)).to(dtype)
    return network.eval().requires_grad_(False)
