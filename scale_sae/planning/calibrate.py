"""Measures what the machine can do that this process and its peers run on: `Hardware` that is no data sheet's.

    accelerate launch --multi_gpu --num_processes 8 -m scale_sae.plan --calibrate=machine.json

Ranks that can compute at once do so while products and memory are measured, and all of them send at once while links
are. Every figure is the median over rounds, of the slowest rank.
"""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

from scale_sae import kernels, topology
from scale_sae.activations.architecture import build_architecture
from scale_sae.activations.tokens import open_chunks
from scale_sae.collectives import Ranks, Shard
from scale_sae.config import DataConfig, ModelConfig, TrainConfig
from scale_sae.job_trainer import JobTrainer, new_sae
from scale_sae.jobs import JobSpec
from scale_sae.planning.hardware import COMMUNICATOR, Hardware, Link, communicator_source, ring
from scale_sae.planning.work import CODES_OPS, SCORE_PASSES
from scale_sae.saes.topk import TopKTrainingSAEConfig
from scale_sae.selection import TopK
from scale_sae.topology import Group, Plan

ROUNDS = 7
TEXT = DataConfig()
IN_A_ROW = 5  # messages that are timed together
MIB = 2**20

# Sizes, by the kind of device: enough to keep it busy, and to take seconds in all.
# Products [rows, d_in] x [d_in, latents].
PRODUCTS = {
    "cpu": ((1024, 256, 4096), (1024, 512, 4096), (512, 1024, 4096)),
    "cuda": ((8192, 1024, 32768), (8192, 4096, 32768), (4096, 4096, 65536)),
}
DTYPES = {"cpu": ("float32", "bfloat16", "float64"), "cuda": ("float32", "tf32", "bfloat16", "float16", "float64")}
PASS_BYTES = {"cpu": 128 * MIB, "cuda": 1024 * MIB}
# A table and its entries: rows, columns, entries of each sum.
GATHER = {"cpu": (8192, 512, 32), "cuda": (131072, 4096, 64)}
# A selection: rows, latents, k.
SELECTION = {"cpu": (1024, 4096, 32), "cuda": (8192, 32768, 64)}
MESSAGES = {"cpu": (2**12, 2**16, 2**20, 2**23), "cuda": (2**16, 2**20, 2**24, 2**27)}


class Ranked(Protocol):
    """One rank of a session that is connected: `scale_sae.session.Session`."""

    rank: int
    world_size: int
    local_rank: int
    store: Store


def measure(session: Ranked) -> Hardware | None:
    """What this machine can do, on rank 0; None on the others. Takes some 20 s."""
    device, backend = topology.pick_device(session.local_rank)
    before = _taken(device)
    place = topology.build(_plan(session.world_size), session.rank, device, backend, session.store)
    of_groups = _taken(device) - before  # communicators, which `Hardware.communicator` stands for
    kind: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    local = place.shard.size
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = None if kind == "cuda" else max(1, cores // torch.get_num_threads())
    computes = at_once is None or session.local_rank < at_once
    meter = _Meter(device, computes)
    overhead = _overhead(meter)
    held = _processes()  # of one that has computed and sent, little though it was
    figures = _computing(meter, kind)
    intra, inter, said = _links(meter, place.shard, place.wire, kind)
    if kind == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
        held = _taken(device) - of_groups, 0
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    runtime, reading = (int(meter.largest(float(part))) for part in held)
    if session.rank:
        return None
    name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads each on {cores} cores, " if kind == "cpu" else ""
    return Hardware(
        name=name,
        kind=kind,
        memory=memory,
        runtime=runtime,
        reading=reading,
        communicator=COMMUNICATOR if kind == "cuda" else 0,
        **figures,
        overhead=overhead,
        intra=intra,
        inter=inter,
        at_once=at_once,
        sources=(
            f"Measured on {time.strftime('%Y-%m-%d')}: {name}, {session.world_size} ranks, {local} per node, {threads}"
            f"torch {torch.__version__}, backend {backend}.",
            *said,
            *([communicator_source()] if kind == "cuda" else []),
        ),
    )


def _plan(world: int) -> Plan:
    """A world whose tp groups are the ranks of a node, and whose dp groups those at the same place of all nodes."""
    local = topology.local_world_size()
    if world % local:
        local = world
    ranks = tuple(range(world))
    group = Group(0, ranks, world // local, local, (0,), ("x",))
    return Plan(world, True, tuple((rank,) for rank in ranks), (group,), world, "fsdp2")


class _Meter:
    """Times calls on several ranks at once."""

    def __init__(self, device: torch.device, computes: bool):
        """``computes``: whether this rank takes part where only as many do as can compute at once."""
        self.device = device
        self.computes = computes

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of one call, on the slowest rank, of as many as can compute at once; all ranks ask for it."""
        return self._median(call if self.computes else lambda: None)

    def message_seconds(self, call: Callable[[], Any]) -> float:
        """Of one call that all ranks make, in a row of them: one alone would show who came late."""
        return self._median(lambda: [call() for _ in range(IN_A_ROW)]) / IN_A_ROW

    def _median(self, call: Callable[[], Any]) -> float:
        found = []
        for round_ in range(ROUNDS + 1):
            dist.all_reduce(torch.zeros(1))  # begin together
            begun = self._now()
            call()
            taken = self.largest(self._now() - begun)
            if round_:  # the first warms up
                found.append(taken)
        return statistics.median(found)

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        largest = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


# ---- computing -------------------------------------------------------------------------------------------------------


def _computing(meter: _Meter, kind: str) -> dict[str, Any]:
    """The figures of `Hardware` that a device has by itself."""
    bandwidth = _pass(meter, PASS_BYTES[kind])
    return {
        "matrix": {dtype: _product_rate(meter, dtype, kind) for dtype in DTYPES[kind]},
        "bandwidth": bandwidth,
        "gather": _gathered(meter, *GATHER[kind]),
        "fresh": _fresh(meter, PASS_BYTES[kind] // 2) if kind == "cpu" else None,
        "candidate": _candidate(meter, bandwidth, kind, *SELECTION[kind]),
    }


def _product_rate(meter: _Meter, name: str, kind: str) -> float:
    """FLOP/s of products, the median over their sizes."""
    dtype = getattr(torch, "float32" if name == "tf32" else name)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, name == "tf32"
    rates = []
    for rows, d_in, latents in PRODUCTS[kind]:
        x = torch.randn(rows, d_in, device=meter.device).to(dtype)
        weight = torch.randn(latents, d_in, device=meter.device).to(dtype).T
        out = torch.empty(rows, latents, dtype=dtype, device=meter.device)
        rates.append(2 * rows * d_in * latents / meter.seconds(partial(torch.mm, x, weight, out=out)))
    torch.backends.cuda.matmul.allow_tf32 = before
    return statistics.median(rates)


def _pass(meter: _Meter, size: int) -> float:
    """Bytes/s, read + written."""
    x = torch.zeros(size // 4, device=meter.device)
    out = torch.zeros_like(x)
    return 2 * size / meter.seconds(partial(torch.add, x, 1, out=out))


def _fresh(meter: _Meter, size: int) -> float:
    """Bytes/s at which new memory is written."""
    return size / meter.seconds(lambda: torch.full((size,), 1, dtype=torch.uint8))


def _gathered(meter: _Meter, rows: int, columns: int, each: int) -> float:
    """Bytes/s of rows that `weighted_sums` reads."""
    table = torch.randn(rows, columns, device=meter.device)
    sums = rows // each
    indices = torch.randint(rows, (sums * each,), device=meter.device)
    offsets = torch.arange(0, sums * each + 1, each, device=meter.device)
    weights = torch.ones(sums * each, device=meter.device)
    taken = meter.seconds(partial(kernels.on(table).weighted_sums, indices, offsets, weights, table))
    return sums * each * columns * 4 / taken


def _candidate(meter: _Meter, bandwidth: float, kind: str, rows: int, latents: int, k: int) -> float:
    """Seconds for each entry that a selection looks at again: what it takes beside its passes over all scores."""
    scores = torch.randn(rows, latents, device=meter.device)
    one, zero = torch.ones(latents, device=meter.device), torch.zeros(latents, device=meter.device)

    def select() -> None:
        selection = TopK(k, Shard())
        selection.add(scores, one, zero)
        selection.choose()

    passes = SCORE_PASSES[kind] * scores.nbytes / bandwidth
    taken = meter.seconds(select)
    return max(taken - passes, 0.05 * taken) / (rows * k)  # never nothing, whatever the noise


def _overhead(meter: _Meter) -> float:
    """Seconds of the host for one operation: an SAE's step that is too small to compute anything."""
    cfg = TopKTrainingSAEConfig(d_in=8, d_sae=32, k=2)
    train = TrainConfig(training_tokens=10**6, train_batch_size_tokens=8, lr=1e-3)
    spec = JobSpec("calibration", "x", "x", 0, "topk", cfg, train, None)
    job = JobTrainer(spec, new_sae(spec, Shard(), meter.device, 0), 1000)
    x = torch.randn(8, 8, device=meter.device)
    return meter.seconds(lambda: [job.step(x, x, 8, step, False) for step in range(1, 6)]) / 5 / CODES_OPS


# ---- links -----------------------------------------------------------------------------------------------------------


def _links(meter: _Meter, shard: Shard, wire: torch.device, kind: str) -> tuple[Link, Link, list[str]]:
    """The link inside nodes, that between them, and what is to be said of them."""
    within = _link(meter, shard, wire, kind)
    between = _link(meter, shard.dp, wire, kind)
    said = []
    if within is None:
        said.append("No rank shares a node with another: the link between nodes stands for that inside one.")
    if between is None:
        said.append("One node: its inner link stands for that between nodes (--hardware.inter_gbps).")
    if within is None and between is None:
        said = ["One rank: no link was measured, and those given mean nothing (--hardware.intra_gbps, .inter_gbps)."]
    found = within or between or Link(1e9, 1e-4)
    return within or found, between or found, said


def _link(meter: _Meter, ranks: Ranks, wire: torch.device, kind: str) -> Link | None:
    """The link among ``ranks``, all of which measure at once, as do other such groups; None for one rank."""
    if ranks.size == 1:
        return None
    times = []
    for size in MESSAGES[kind]:
        whole = torch.zeros(size // 4 // ranks.size * ranks.size, device=meter.device)
        part = whole[: len(whole) // ranks.size].clone()
        times += [
            ("all_reduce", 2 * whole.nbytes, meter.message_seconds(partial(ranks.all_reduce, whole))),
            ("all_gather", whole.nbytes, meter.message_seconds(partial(ranks.all_gather, part))),
        ]
        message = torch.zeros(size // 4, device=wire)
        times.append(("send", message.nbytes, meter.message_seconds(partial(_pass_on, message, ranks))))
    return fit(times, ranks.size)


def _pass_on(message: Tensor, ranks: Ranks) -> None:
    """Sends to the next rank of the ring while that before it sends."""
    peers = dist.get_process_group_ranks(ranks.group)
    to, source = peers[(ranks.rank + 1) % ranks.size], peers[ranks.rank - 1]
    operations = [
        dist.P2POp(dist.isend, message, to, ranks.group),
        dist.P2POp(dist.irecv, torch.empty_like(message), source, ranks.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def fit(times: list[tuple[str, int, float]], ranks: int) -> Link:
    """The link by which calls (operation, bytes, seconds) take as long as they did: least squares of relative errors.

    A call takes messages x latency + share x bytes / bandwidth (`ring`), so it is linear in latency and 1 / bandwidth.
    """
    rows, moved = [], []
    for op, size, seconds in times:
        messages, share = ring(op, ranks)
        rows.append([messages / seconds, share * size / seconds])
        moved.append(1.0)
    matrix, ones = torch.tensor(rows, dtype=torch.float64), torch.tensor(moved, dtype=torch.float64)
    scale = matrix.norm(dim=0)
    latency, inverse = (torch.linalg.lstsq(matrix / scale, ones[:, None]).solution.squeeze(1) / scale).tolist()
    # Where noise would have one of them below 0, the other explains everything.
    if latency <= 0:
        latency, inverse = 1e-9, statistics.median(1 / float(row[1]) for row in rows)
    if inverse <= 0:
        latency, inverse = statistics.median(1 / float(row[0]) for row in rows), 1e-15
    return Link(1 / inverse, latency)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _taken(device: torch.device) -> int:
    """Bytes of a GPU that are taken, but for torch's tensors and what it keeps for them; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    free, memory = torch.cuda.mem_get_info(device)
    return memory - free - torch.cuda.memory_reserved(device)


def _processes() -> tuple[int, int]:
    """Bytes of a process that has looked at a model's architecture, and how many more once it reads text.

    Both with the model and the text that come with the package.
    """
    build_architecture(ModelConfig())
    before = _resident()
    chunks = iter(open_chunks(TEXT, ModelConfig()))
    next(chunks)
    return before, max(0, _resident() - before)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
