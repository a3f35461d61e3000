"""Every topology of some number of ranks that a run can have, and which of them is fastest."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from scale_sae.activations.architecture import build_architecture
from scale_sae.activations.tensor_parallel import parallel_styles
from scale_sae.config import LMTopology, RunConfig, SAETopology, TopologyConfig
from scale_sae.errors import UserError
from scale_sae.planning.estimate import Estimate
from scale_sae.planning.hardware import Hardware
from scale_sae.planning.workload import Workload

if TYPE_CHECKING:
    from scale_sae.planning.language_model import LMProfile

# Steps that differ by less are as fast as each other: then fewer ranks are better.
AS_FAST = 1.01


def search(
    w: Workload,
    hardware: Hardware,
    ranks: int,
    per_node: int,
    profile_of: Callable[[RunConfig], "LMProfile | None"],
) -> list[Estimate]:
    """Topologies of at most ``ranks`` ranks that fit, fastest first; of those as fast, the one of fewest ranks.

    Of each division of the SAEs, the copies of the language model are as many as it can use, and each is split over a
    power of two of ranks. ``lm.parallel: device_map`` and ``lm.cache`` stay as they are.

    Raises:
        UserError: with ``device_map``, ``lm.devices_per_rank`` does not say how many GPUs a copy has.
    """

    lm = w.config.topology.lm
    if lm.parallel == "device_map" and lm.devices_per_rank is None:
        raise UserError("--search: with topology.lm.parallel: device_map, set topology.lm.devices_per_rank")
    weights = 0  # of a copy of the model, at least
    if lm.cache is None and lm.parallel == "tp":
        weights = sum(p.numel() for p in build_architecture(w.config.model).parameters()) * w.dtype.itemsize

    def estimated(laid_out: TopologyConfig) -> Estimate | None:
        if weights / laid_out.lm.tp > hardware.memory:
            return None  # without running the model to learn more
        try:
            placed = w.on(laid_out)
            found = Estimate(placed, hardware, per_node, profile_of(placed.config))
        except UserError:
            return None
        return found if found.fits else None

    found = [estimated(laid_out) for laid_out in colocated(w, ranks)]
    found += [_fewest_copies(laid_out, most, estimated) for laid_out, most in dedicated(w, ranks)]
    return sorted((one for one in found if one is not None), key=_order)


def _order(one: Estimate) -> tuple[int, int, float]:
    seconds = one.prediction.step_seconds
    return math.floor(math.log(seconds, AS_FAST)), one.workload.plan.world_size, seconds


def _fewest_copies(
    laid_out: TopologyConfig, most: int, estimated: Callable[[TopologyConfig], Estimate | None]
) -> Estimate | None:
    """The topology with as many copies of the language model as it can use, of ``most``."""

    def with_copies(count: int) -> Estimate | None:
        return estimated(replace(laid_out, lm=replace(laid_out.lm, dp=count)))

    found = with_copies(most)
    while found is None and most > 1:
        most //= 2  # SAE ranks have room for a chunk of each copy
        found = with_copies(most)
    if found is None:
        return None
    # The language model's time divides by its copies, so this many would do.
    step = found.prediction.step_seconds
    enough = max(1, math.ceil(most * found.prediction.sides["LM"] / step))
    fewer = with_copies(enough) if enough < most else None
    return fewer if fewer is not None and fewer.prediction.step_seconds <= AS_FAST * step else found


def colocated(w: Workload, ranks: int) -> Iterator[TopologyConfig]:
    """The topologies without ranks for the language model alone: it runs on the SAE ranks, or a cache stands for it."""
    if w.config.topology.lm.parallel == "device_map":
        return
    for sae in divisions(w, ranks):
        cached = w.config.topology.lm.cache is not None
        lm = w.config.topology.lm if cached else LMTopology(dp=sae.groups * sae.dp * sae.tp, colocated=True)
        yield replace(w.config.topology, lm=lm, sae=sae, engine=engine(w, sae))


def dedicated(w: Workload, ranks: int) -> Iterator[tuple[TopologyConfig, int]]:
    """The topologies with ranks for the language model, one copy each, and how many copies there is room for."""
    lm = w.config.topology.lm
    if lm.cache is not None:
        return
    spread = lm.parallel == "device_map"
    for tp in [1] if spread else splits(w, ranks - 1):
        own = (lm.devices_per_rank or 1) if spread else tp
        copy = replace(lm, dp=1) if spread else LMTopology(tp=tp)
        for sae in divisions(w, ranks - own):
            room = (ranks - sae.groups * sae.dp * sae.tp) // own
            yield replace(w.config.topology, lm=copy, sae=sae, engine=engine(w, sae)), room


def divisions(w: Workload, ranks: int) -> Iterator[SAETopology]:
    """The grids of at most ``ranks`` SAE ranks. Of groups of equal SAEs, the fewest for each number in the fullest."""
    jobs = len(w.specs)
    groups = sorted({math.ceil(jobs / each) for each in range(1, jobs + 1)})
    if len({spec.planned.cost for spec in w.specs}) > 1:
        groups = list(range(1, jobs + 1))
    lanes = w.config.buffer.lanes
    shards = [n for n in range(1, lanes + 1) if lanes % n == 0 and all(s.cfg.d_sae % n == 0 for s in w.specs)]
    for count in groups:
        for size in shards:
            if count * size > ranks:
                break
            for dp in shards:
                if size % dp == 0:
                    yield SAETopology(groups=count, dp=dp, tp=size // dp)


def engine(w: Workload, sae: SAETopology) -> Literal["local", "fsdp2", "deepspeed"]:
    """The engine of a grid: the run's own where it can be, else fsdp2, which needs no settings."""
    if w.config.topology.engine == "deepspeed":
        return "deepspeed"
    return "local" if sae.dp == 1 else "fsdp2"


def splits(w: Workload, ranks: int) -> Iterator[int]:
    """The numbers of ranks that a copy of the language model can be split over, powers of two."""
    network = build_architecture(w.config.model)
    for tp in (2**n for n in range(max(ranks, 1).bit_length())):
        if tp > ranks:
            return
        try:
            if tp > 1:
                parallel_styles(network, tp, w.config.model.name)
        except UserError:
            return
        yield tp
