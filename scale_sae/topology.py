"""Which rank does what: ``plan`` is arithmetic on the config, ``build`` makes the process groups of one rank.

Ranks of SAE groups come first, so that rank 0 always trains SAEs; dedicated LM ranks follow. Inside a group the ranks
are a (dp, tp) grid in row-major order, inside an LM replica they are its tp ranks.
"""

import datetime
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh

from scale_sae.collectives import ALONE, Ranks, Shard
from scale_sae.config import TopologyConfig
from scale_sae.errors import UserError

# Long, because a slow dataset or a first compilation is no fault; a lost rank is noticed by its closed connection.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=60)
# LM ranks are done long before the SAE ranks have used up the buffer, and wait for them at the end.
CONTROL_TIMEOUT = datetime.timedelta(days=7)
_connections = itertools.count()


@dataclass(frozen=True)
class Job:
    """One SAE trained at one hookpoint. ``cost`` is its work per row, in any unit that is the same for all.

    ``target`` is the hookpoint of what it reconstructs, for transcoders; None: its own.
    """

    sae_id: str
    hookpoint: str
    cost: int
    target: str | None = None


@dataclass(frozen=True)
class Group:
    """The ranks that train one set of jobs together. ``ranks[p * tp + t]`` is dp rank p, tp rank t."""

    index: int
    ranks: tuple[int, ...]
    dp: int
    tp: int
    jobs: tuple[int, ...]
    hookpoints: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """The whole run's topology, the same object on every rank.

    ``lm[p]`` are the tp ranks of LM replica p; in a colocated run every SAE rank is a replica of its own. ``engine`` is
    what divides the optimizer state of a group's dp ranks.
    """

    world_size: int
    colocated: bool
    lm: tuple[tuple[int, ...], ...]
    groups: tuple[Group, ...]
    lanes: int
    engine: str = "local"

    @property
    def sae_ranks(self) -> tuple[int, ...]:
        return tuple(rank for group in self.groups for rank in group.ranks)

    def group_of(self, rank: int) -> Group | None:
        return next((group for group in self.groups if rank in group.ranks), None)

    def replica_of(self, rank: int) -> int | None:
        return next((index for index, ranks in enumerate(self.lm) if rank in ranks), None)

    def lane_block(self, group: Group, rank: int) -> range:
        """The lanes that ``rank`` hosts: an equal, contiguous share, in rank order."""
        share = self.lanes // len(group.ranks)
        place = group.ranks.index(rank)
        return range(place * share, (place + 1) * share)

    def receivers(self, rank: int, group: Group) -> tuple[int, ...]:
        """The SAE ranks of ``group`` that LM rank ``rank`` sends to: every lm.tp-th, its peers send to the others."""
        replica = self.replica_of(rank)
        assert replica is not None
        ranks = self.lm[replica]
        return tuple(group.ranks[place] for place in range(len(group.ranks)) if ranks[place % len(ranks)] == rank)

    def sender(self, replica: int, group: Group, rank: int) -> int:
        """The LM rank of ``replica`` that sends to SAE rank ``rank``: the inverse of ``receivers``."""
        ranks = self.lm[replica]
        return ranks[group.ranks.index(rank) % len(ranks)]


def split_jobs(jobs: Sequence[Job], groups: int) -> list[list[int]]:
    """Job indices per group, with the costs as even as greedy assignment makes them.

    Jobs of one hookpoint stay together, so that its activations travel to one group only, unless a group would stay
    empty. The dearest bundle goes first, always to the cheapest group so far (the longest-processing-time rule).
    """
    if len(jobs) < groups:
        raise UserError(f"topology.sae.groups: {groups} groups for {len(jobs)} SAEs; set it to at most {len(jobs)}")
    bundles: dict[str, list[int]] = {}
    for index, job in enumerate(jobs):
        bundles.setdefault(job.hookpoint, []).append(index)
    pieces = list(bundles.values())
    while len(pieces) < groups:
        largest = max(range(len(pieces)), key=lambda i: (len(pieces[i]), -i))
        piece = pieces.pop(largest)
        pieces += [piece[: len(piece) // 2], piece[len(piece) // 2 :]]
    pieces.sort(key=lambda piece: (-sum(jobs[i].cost for i in piece), piece))
    result: list[list[int]] = [[] for _ in range(groups)]
    for piece in pieces:
        target = min(range(groups), key=lambda g: (sum(jobs[i].cost for i in result[g]), len(result[g]), g))
        result[target] += piece
    return [sorted(indices) for indices in result]


def plan(topology: TopologyConfig, jobs: Sequence[Job], lanes: int) -> Plan:
    """The plan of a run. Pure: no processes, no devices.

    ``UserError`` if there are fewer jobs than groups. Divisibility of lanes is checked with the config.
    """
    sae, lm = topology.sae, topology.lm
    per_group = sae.dp * sae.tp
    groups = []
    for index, members in enumerate(split_jobs(jobs, sae.groups)):
        inputs = [jobs[i].hookpoint for i in members]
        targets = [target for i in members if (target := jobs[i].target) is not None]
        hookpoints = tuple(dict.fromkeys(inputs + targets))
        ranks = tuple(range(index * per_group, (index + 1) * per_group))
        groups.append(Group(index, ranks, sae.dp, sae.tp, tuple(members), hookpoints))
    n_sae = sae.groups * per_group
    if lm.shares_ranks:
        replicas: tuple[tuple[int, ...], ...] = tuple((rank,) for rank in range(n_sae))
    else:
        replicas = tuple(tuple(range(n_sae + p * lm.tp, n_sae + (p + 1) * lm.tp)) for p in range(lm.dp))
    return Plan(topology.world_size, lm.shares_ranks, replicas, tuple(groups), lanes, topology.engine)


@dataclass(frozen=True)
class Topology:
    """One rank's place in the plan and its process groups. Groups that a rank is no member of are absent or None.

    ``control`` and ``sae_control`` carry small CPU messages (gloo), ``checkpoint_control`` those of the threads that
    write checkpoints, and nothing else. ``data`` and ``header`` are keyed by
    (LM replica, SAE group) in a dedicated run; in a colocated run the one key is (0, 0) and spans the world.
    ``evaluation`` (gloo, all ranks; None in a run that does not evaluate) carries what evaluations exchange.
    ``dp_mesh`` is there for the engine fsdp2, ``deepspeed`` (what a JSON file of it holds) for that engine.
    ``wire`` is the device of what ``data`` carries: the CPU where gloo does, which sends nothing from a GPU.
    """

    plan: Plan
    rank: int
    device: torch.device
    wire: torch.device
    store: Store
    control: dist.ProcessGroup
    sae_control: dist.ProcessGroup | None
    checkpoint_control: dist.ProcessGroup | None
    group: Group | None
    shard: Shard
    dp_mesh: DeviceMesh | None
    deepspeed: Mapping[str, Any] | None
    lm_mesh: DeviceMesh | None
    lm_control: dist.ProcessGroup | None
    data: Mapping[tuple[int, int], dist.ProcessGroup]
    header: Mapping[tuple[int, int], dist.ProcessGroup]
    evaluation: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class LMRanks:
    """One rank's place in a world that only runs the language model: ``replicas`` copies of it, each over some ranks.

    ``devices`` are this rank's, the first of which gets inputs and activations; ``lm_mesh`` are the ranks that share a
    copy. ``lm_control`` (those ranks) and ``control`` (all ranks) carry small CPU messages.
    """

    rank: int
    replica: int
    replicas: int
    devices: tuple[torch.device, ...]
    lm_mesh: DeviceMesh
    lm_control: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def device(self) -> torch.device:
        return self.devices[0]

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its copy: the one that reads text and writes files."""
        return dist.get_rank(self.lm_control) == 0


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher set them; a process without a launcher is a world of one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(name in os.environ for name in names):
        return 0, 1, 0
    rank, world_size, local_rank = (int(os.environ[name]) for name in names)
    return rank, world_size, local_rank


def check_world_size(topology: TopologyConfig, world_size: int, program: str) -> None:
    """``UserError`` with both numbers and a command that starts the right one, unless they agree.

    ``program``: what the launcher is to start, such as ``-m scale_sae.train --config C.yaml``.
    """
    needed = topology.world_size
    if needed != world_size:
        raise UserError(
            f"topology: needs {needed} ranks but {world_size} were started; start it with: accelerate launch "
            f"{'--multi_gpu ' if needed > 1 else ''}--num_processes {needed} {program}"
        )


def local_world_size() -> int:
    """The processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_gpus() -> int:
    """The GPUs of this machine that the run may use: those that are visible.

    ``ACCELERATE_USE_CPU`` (set by ``accelerate launch --cpu`` and by ``use_cpu: true``) keeps a run off them.
    """
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    return 0 if on_cpu or not torch.cuda.is_available() else torch.cuda.device_count()


def pick_backend() -> str:
    """The backend for device collectives: gloo where ranks share a GPU, since NCCL needs one per rank."""
    return "nccl" if local_world_size() <= usable_gpus() else "gloo"


def pick_device(local_rank: int) -> tuple[torch.device, str]:
    """The device of a process that has one, and the backend for device collectives."""
    gpus = usable_gpus()
    if not gpus:
        return torch.device("cpu"), "gloo"
    device = torch.device("cuda", local_rank % gpus)
    torch.cuda.set_device(device)
    return device, pick_backend()


def gpus_of_ranks(
    topology: TopologyConfig, ranks: Sequence[int], gpus: int, sae_ranks: int | None = None
) -> list[range]:
    """The GPUs of each rank of one machine, by their numbers. Pure.

    Each rank has one, ranks taking turns where there are fewer. With ``lm.parallel: device_map`` no two ranks share:
    SAE ranks have one each, and each LM rank ``lm.devices_per_rank``, or an even share of those that are left.

    Args:
        topology: of the run.
        ranks: the machine's ranks, in the order of their local ranks.
        gpus: of the machine, at least 1.
        sae_ranks: how many of the world's first ranks train SAEs; None: those of ``topology``.

    Raises:
        UserError: there are not enough.
    """
    lm = topology.lm
    first_lm = topology.sae_ranks if sae_ranks is None else sae_ranks
    n_lm = sum(rank >= first_lm for rank in ranks)
    if lm.parallel != "device_map" or not n_lm:
        return [range(place % gpus, place % gpus + 1) for place in range(len(ranks))]
    n_sae = len(ranks) - n_lm
    spare = gpus - n_sae
    if spare < n_lm:
        raise UserError(
            f"topology.lm.parallel: device_map needs a GPU for each of {n_sae} SAE ranks and at least one for each of "
            f"{n_lm} LM ranks, but a machine has {gpus}; use more machines, or lower topology.lm.dp or topology.sae"
        )
    share = spare // n_lm if lm.devices_per_rank is None else lm.devices_per_rank
    if share * n_lm > spare:
        raise UserError(
            f"topology.lm.devices_per_rank: {share} for each of {n_lm} LM ranks and one for each of {n_sae} SAE ranks "
            f"are {share * n_lm + n_sae} GPUs, but a machine has {gpus}; set it to at most {spare // n_lm}"
        )
    sizes = [share if rank >= first_lm else 1 for rank in ranks]
    return [range(sum(sizes[:place]), sum(sizes[: place + 1])) for place in range(len(ranks))]


def pick_devices(
    topology: TopologyConfig, rank: int, local_rank: int, sae_ranks: int | None = None
) -> tuple[torch.device, ...]:
    """This rank's devices, the first of which is its own for all but the layers of a language model that is spread.

    ``sae_ranks`` as for ``gpus_of_ranks``. ``UserError`` where ``topology.lm`` asks for more than the machine has.
    """
    gpus = usable_gpus()
    if not gpus:
        if topology.lm.devices_per_rank is not None:
            raise UserError(
                f"topology.lm.devices_per_rank: {topology.lm.devices_per_rank} counts GPUs, and there are none here; "
                "remove it (max_memory_gib limits what is kept in RAM)"
            )
        return (torch.device("cpu"),)
    first = rank - local_rank
    last = max(first + local_world_size() - 1, rank)  # launchers of another kind may not say how many they start
    own = gpus_of_ranks(topology, range(first, last + 1), gpus, sae_ranks)[local_rank]
    devices = tuple(torch.device("cuda", number) for number in own)
    torch.cuda.set_device(devices[0])
    return devices


def open_store(rank: int, world_size: int) -> Store:
    """The store in which the ranks find each other: the launcher's, without one rank 0's."""
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        return HashStore()
    return _shared_store(rank, world_size, os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])


@functools.cache
def _shared_store(rank: int, world_size: int, host: str, port: str) -> Store:
    """The store at ``host:port``, kept: rank 0 of a second run of this process must not close it and open another."""
    base, _, _ = next(iter(rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT)))
    return base


def connect(rank: int, world_size: int, backend: str, base: Store | None = None) -> Store:
    """Makes the default process group on ``base`` (None: opens the store) and returns a store for the run's own keys.

    The keys hold the launcher's restart count and how many groups this process had before: a restarted rank, or a
    second run, would otherwise read the addresses of those before.
    """
    if base is None:
        base = open_store(rank, world_size)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"scale_sae/{attempt}/{next(_connections)}", base)
    default = "gloo" if backend == "gloo" else f"cpu:gloo,cuda:{backend}"
    _forget_meshes()
    dist.init_process_group(default, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    return PrefixStore("run", store)


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[Store]:
    """This process as ``rank`` of a world whose other ranks do not exist; ``build`` takes the backend "fake" then.

    Nothing is sent and nothing waits (torch's fake process group): for trying a topology without its machines.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
    try:
        yield store
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """DTensor keeps what it learnt of a mesh and takes another of the same ranks for it, whose groups may be gone."""
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


def build(
    plan: Plan,
    rank: int,
    device: torch.device,
    backend: str,
    store: Store,
    deepspeed: Mapping[str, Any] | None = None,
    evaluates: bool = False,
) -> Topology:
    """Makes every process group of the run, in one order on all ranks, and returns this rank's view.

    ``evaluates``: whether the run measures on held-out text while it trains.

    Needs the default group of ``connect``. Each group is used once here, so that no communicator is set up lazily
    later, in an order that could differ between ranks.
    """
    made: list[tuple[tuple[int, ...], dist.ProcessGroup]] = []
    small = "fake" if backend == "fake" else "gloo"  # of the groups for small CPU messages

    def group(
        ranks: Sequence[int], kind: str, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT
    ) -> dist.ProcessGroup | None:
        handle = dist.new_group(list(ranks), backend=kind, timeout=timeout)
        if rank not in ranks:
            return None
        made.append((tuple(ranks), handle))
        return handle

    control = group(range(plan.world_size), small, CONTROL_TIMEOUT)
    assert control is not None
    sae_control = group(plan.sae_ranks, small)
    checkpoint_control = group(plan.sae_ranks, small)
    shard = _shard(plan, rank, lambda ranks: group(ranks, backend))
    dp_mesh = None
    if plan.engine == "fsdp2" and shard.dp.group is not None:
        dp_mesh = DeviceMesh.from_group(shard.dp.group, device.type)
    lm_mesh, lm_control = None, None
    if not plan.colocated:
        for ranks in plan.lm:
            handle, twin = group(ranks, backend), group(ranks, small)
            if handle is not None:
                lm_mesh, lm_control = DeviceMesh.from_group(handle, device.type), twin
    data, header = {}, {}
    for key, ranks in _wires(plan).items():
        wire, twin = group(ranks, backend), group(ranks, small)
        if wire is not None and twin is not None:
            data[key], header[key] = wire, twin
    evaluation = group(range(plan.world_size), small) if evaluates else None
    for _, handle in made:
        dist.all_reduce(torch.zeros(1, device=device if handle.name() == "nccl" else "cpu"), group=handle)
    return Topology(
        plan=plan,
        rank=rank,
        device=device,
        wire=torch.device("cpu") if backend == "gloo" else device,
        store=store,
        control=control,
        sae_control=sae_control,
        checkpoint_control=checkpoint_control,
        group=plan.group_of(rank),
        shard=shard,
        dp_mesh=dp_mesh,
        deepspeed=deepspeed,
        lm_mesh=lm_mesh,
        lm_control=lm_control,
        data=data,
        header=header,
        evaluation=evaluation,
    )


def build_lm(rank: int, world_size: int, tp: int, devices: tuple[torch.device, ...], backend: str) -> LMRanks:
    """Makes the process groups of a world that only runs the language model; ranks p·tp to p·tp + tp - 1 are copy p.

    Needs the default group of ``connect``. ``UserError`` where the ranks do not divide into copies.
    """
    if world_size % tp:
        raise UserError(
            f"topology.lm.tp: {tp} ranks for each copy of the model, but {world_size} were started; start a multiple "
            f"of {tp} with accelerate launch --num_processes, or set topology.lm.tp to a divisor of {world_size}"
        )
    replicas = [list(range(first, first + tp)) for first in range(0, world_size, tp)]
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    # Every rank takes part in making every group, in one order, and keeps its own.
    handles = [dist.new_group(ranks, backend=backend, timeout=COLLECTIVE_TIMEOUT) for ranks in replicas]
    twins = [dist.new_group(ranks, backend="gloo", timeout=COLLECTIVE_TIMEOUT) for ranks in replicas]
    replica = rank // tp
    lm_mesh = DeviceMesh.from_group(handles[replica], devices[0].type)
    for group in (control, handles[replica], twins[replica]):
        dist.all_reduce(torch.zeros(1, device=devices[0] if group.name() == "nccl" else "cpu"), group=group)
    return LMRanks(rank, replica, len(replicas), devices, lm_mesh, twins[replica], control)


def _shard(plan: Plan, rank: int, group: Callable[[Sequence[int]], dist.ProcessGroup | None]) -> Shard:
    """This rank's place among tp and dp ranks, from the groups of both of every SAE group, which ``group`` makes."""
    shard, dp = Shard(), ALONE
    for sae_group in plan.groups:
        for p in range(sae_group.dp):
            ranks = sae_group.ranks[p * sae_group.tp : (p + 1) * sae_group.tp]
            handle = group(ranks)
            if handle is not None:
                shard = Shard(ranks.index(rank), len(ranks), handle)
        for t in range(sae_group.tp if plan.engine != "local" else 0):
            ranks = sae_group.ranks[t :: sae_group.tp]
            handle = group(ranks)
            if handle is not None:
                dp = Ranks(ranks.index(rank), len(ranks), handle)
    return replace(shard, dp=dp)


def _wires(plan: Plan) -> dict[tuple[int, int], tuple[int, ...]]:
    """The ranks of every transport group."""
    if plan.colocated:
        return {(0, 0): plan.sae_ranks}
    return {
        (replica, group.index): tuple(sorted((*group.ranks, *ranks)))
        for replica, ranks in enumerate(plan.lm)
        for group in plan.groups
    }
