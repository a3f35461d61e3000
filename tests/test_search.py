"""The search for a topology: it leaves out nothing that is faster, and offers nothing that a run would refuse."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import runs
from scale_sae import config
from scale_sae.config import LMTopology, SAETopology, TopologyConfig
from scale_sae.errors import UserError
from scale_sae.planning import search
from scale_sae.planning.estimate import DEAD_SHARE, Estimate
from scale_sae.planning.hardware import Hardware, Link
from scale_sae.planning.language_model import LMProfile, profile
from scale_sae.planning.storage import checkpoint_bytes
from scale_sae.planning.workload import Workload

FAST = Link(bandwidth=1e11, latency=1e-6)
MACHINE = Hardware(
    name="made up",
    kind="cuda",
    memory=2**34,
    runtime=0,
    reading=0,
    communicator=0,
    matrix={"float32": 1e12, "float64": 5e11},
    bandwidth=1e11,
    gather=5e10,
    overhead=1e-6,
    intra=FAST,
    inter=Link(bandwidth=1e10, latency=1e-5),
    at_once=None,
    sources=(),
    fresh=None,
    candidate=0.0,
)


def workload(folder: Path, **changes: Any) -> Workload:
    """Two SAEs at each of two hookpoints."""
    return Workload.of(config.from_dict(runs.tiny_config(folder, **changes)))


def profile_of(w: Workload) -> Any:
    def found(run: config.RunConfig) -> LMProfile | None:
        return None if run.topology.lm.cache is not None else profile(run, w.widths, MACHINE.kind)

    return found


def every_topology(w: Workload, ranks: int) -> list[Workload]:
    """Written out: all that a run of at most so many ranks would take."""
    found = []
    counts = range(1, ranks + 1)
    for groups, dp, tp in itertools.product(counts, counts, counts):
        sae = SAETopology(groups, dp, tp)
        engine: Any = "local" if dp == 1 else "fsdp2"
        lms = [LMTopology(dp=groups * dp * tp, colocated=True)]
        lms += [LMTopology(tp=lm_tp, dp=lm_dp) for lm_tp, lm_dp in itertools.product([1, 2, 4], counts)]
        for lm in lms:
            laid_out = TopologyConfig(lm=lm, sae=sae, engine=engine)
            if laid_out.world_size > ranks:
                continue
            try:
                found.append(w.on(laid_out))
            except UserError:
                continue
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_nothing_is_faster_than_the_first(ranks: int, tmp_path: Path) -> None:
    w = workload(tmp_path)
    found = search.search(w, MACHINE, ranks, 4, profile_of(w))
    all_of_them = [Estimate(one, MACHINE, 4, profile_of(w)(one.config)) for one in every_topology(w, ranks)]
    fastest = min(one.prediction.step_seconds for one in all_of_them)
    assert found[0].prediction.step_seconds <= search.AS_FAST * fastest
    assert all(one.workload.plan.world_size <= ranks for one in found)
    topologies = [one.workload.config.topology for one in found]
    assert len(set(map(str, topologies))) == len(topologies)


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    """With room for the smallest of all topologies and nothing more, only such are found; with less, none."""
    w = workload(tmp_path)

    def fullest(one: Estimate) -> int:
        return one.fullest[1]

    found = search.search(w, MACHINE, 4, 4, profile_of(w))
    least, most = min(map(fullest, found)), max(map(fullest, found))
    assert least < most
    tight = replace(MACHINE, memory=int(least / 0.92) + 1)
    fitting = search.search(w, tight, 4, 4, profile_of(w))
    assert fitting and {fullest(one) for one in fitting} == {least}
    assert not search.search(w, replace(MACHINE, memory=least), 4, 4, profile_of(w))


def test_a_cache_and_a_spread_model_stay(tmp_path: Path) -> None:
    w = workload(tmp_path)
    cached = w.on(replace(w.config.topology, lm=LMTopology(cache="somewhere")))
    found = search.search(cached, MACHINE, 4, 4, profile_of(cached))
    assert {one.workload.config.topology.lm.cache for one in found} == {"somewhere"}
    spread = w.on(TopologyConfig(lm=LMTopology(parallel="device_map", devices_per_rank=2)))
    for laid_out, room in search.dedicated(spread, 8):
        assert laid_out.lm.parallel == "device_map" and laid_out.lm.devices_per_rank == 2
        sae = laid_out.sae
        assert 1 <= room == (8 - sae.groups * sae.dp * sae.tp) // 2
    assert not list(search.colocated(spread, 8))


def test_a_model_is_split_as_its_plan_allows(tmp_path: Path) -> None:
    """The embedded model has 4 heads of keys and values."""
    w = workload(tmp_path)
    assert list(search.splits(w, 64)) == [1, 2, 4]
    assert list(search.splits(w, 3)) == [1, 2]


# ---- the estimate of one topology ------------------------------------------------------------------------------------


def test_more_dead_latents_take_no_less(tmp_path: Path) -> None:
    """So that what a plan has room for, a share of them, is enough for all smaller ones; split over four ranks too."""
    saes = [{"architecture": "topk", "d_sae": 4096, "k": 4}]
    w = workload(tmp_path, saes=saes, topology={"lm": {"tp": 1}, "sae": {"tp": 4}})
    w = replace(w, specs=tuple(replace(s, train=replace(s.train, dead_feature_window_tokens=1)) for s in w.specs))
    found = Estimate(w, MACHINE, 4, profile_of(w)(w.config))
    role = w.roles()[0]
    taken = [sum(item.bytes for item in found.memory_with(dead)[role]) for dead in range(0, 4097, 64)]
    assert taken == sorted(taken) and taken[0] < taken[-1]
    assert found.dead(DEAD_SHARE) == 820
    assert found.held(role) == sum(item.bytes for item in found.memory_with(820)[role]) >= taken[820 // 64] > taken[0]
    # Where the run ends before a latent can count as dead, none is.
    short = replace(w, specs=tuple(replace(s, train=replace(s.train, training_tokens=100)) for s in w.specs))
    assert replace(found, workload=short).dead(DEAD_SHARE) == 0


def test_a_spread_model_may_be_larger_than_a_gpu(tmp_path: Path) -> None:
    """What fits on no GPU is kept in RAM."""
    w = workload(tmp_path, topology={"lm": {"parallel": "device_map", "devices_per_rank": 2}})
    lm = profile_of(w)(w.config)
    found = Estimate(w, replace(MACHINE, memory=2 * lm.weights), 4, replace(lm, weights=100 * lm.weights))
    role, held = found.fullest
    assert role.kind == "SAE" and held < 2 * lm.weights and found.fits


def test_communicators_take_memory(tmp_path: Path) -> None:
    """Two groups and three copies of the model: a rank of either is in one group with each of the other."""
    w = workload(tmp_path, topology={"lm": {"tp": 1, "dp": 3}, "sae": {"groups": 2, "tp": 2}})
    machine = replace(MACHINE, communicator=10)
    found = Estimate(w, machine, 4, profile_of(w)(w.config))
    of = {role.kind: {item.what: item.bytes for item in items} for role, items in found.memory.items()}
    assert of["SAE"]["communicators"] == 10 * (1 + 3) and of["LM"]["communicators"] == 10 * (1 + 2)


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    path = runs.write_config(tmp_path, runs.tiny_config(tmp_path))
    runs.forked_run(path, 1)
    w = Workload.of(config.load(path))
    folder = tmp_path / "run/checkpoints/step_00000040"  # at the end the buffer is empty
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    # Beside: biases, counters and their moments, 40 bytes of 12 KiB for each latent, and what describes the files.
    assert checkpoint_bytes(w) == pytest.approx(size, rel=0.02) and checkpoint_bytes(w) < size
