"""The plan is arithmetic: every rank has one place, every row one sender, and the work is split evenly."""

import itertools

import pytest
import torch
import torch.distributed as dist

from scale_sae.config import LMTopology, SAETopology, TopologyConfig
from scale_sae.errors import UserError
from scale_sae.topology import (
    Job,
    Plan,
    build,
    check_world_size,
    fake_world,
    gpus_of_ranks,
    pick_devices,
    plan,
    split_jobs,
)


def jobs(count: int, per_hookpoint: int = 1) -> list[Job]:
    return [
        Job(f"layers.{i // per_hookpoint}/{i % per_hookpoint}", f"layers.{i // per_hookpoint}", 100)
        for i in range(count)
    ]


def make(lm: tuple[int, int] | None, sae: tuple[int, int, int], n_jobs: int = 8, lanes: int = 64) -> Plan:
    language = LMTopology(colocated=True) if lm is None else LMTopology(tp=lm[0], dp=lm[1])
    return plan(TopologyConfig(lm=language, sae=SAETopology(*sae)), jobs(n_jobs), lanes)


CASES = [
    ((2, 1), (1, 1, 2)),
    ((1, 2), (1, 1, 1)),
    ((4, 2), (2, 1, 4)),
    ((8, 16), (6, 8, 8)),  # 512 ranks
    (None, (1, 1, 1)),
    (None, (4, 1, 2)),
    ((2, 3), (2, 2, 2)),
]


@pytest.mark.parametrize(("lm", "sae"), CASES)
def test_every_rank_has_a_place(lm: tuple[int, int] | None, sae: tuple[int, int, int]) -> None:
    planned = make(lm, sae)
    sae_ranks = [rank for group in planned.groups for rank in group.ranks]
    lm_ranks = [rank for replica in planned.lm for rank in replica]
    assert sae_ranks == list(range(len(sae_ranks)))
    assert planned.world_size == len(set(sae_ranks + lm_ranks))
    if lm is None:
        assert lm_ranks == sae_ranks
    else:
        assert not set(sae_ranks) & set(lm_ranks)
        assert [len(replica) for replica in planned.lm] == [lm[0]] * lm[1]
    assert sorted(i for group in planned.groups for i in group.jobs) == list(range(8))


@pytest.mark.parametrize(("lm", "sae"), CASES)
def test_lanes_are_hosted_once_and_sent_once(lm: tuple[int, int] | None, sae: tuple[int, int, int]) -> None:
    planned = make(lm, sae, lanes=384)
    for group in planned.groups:
        hosted = [lane for rank in group.ranks for lane in planned.lane_block(group, rank)]
        assert hosted == list(range(384))
        for replica, ranks in enumerate(planned.lm):
            reached = [receiver for rank in ranks for receiver in planned.receivers(rank, group)]
            assert sorted(reached) == list(group.ranks)
            for rank in ranks:
                for receiver in planned.receivers(rank, group):
                    assert planned.sender(replica, group, receiver) == rank


def test_jobs_are_split_by_cost() -> None:
    costs = [8, 7, 6, 5, 4, 3, 2, 1]
    dealt = split_jobs([Job(str(i), str(i), cost) for i, cost in enumerate(costs)], 2)
    totals = [sum(costs[i] for i in group) for group in dealt]
    assert totals == [18, 18]


def test_a_group_receives_the_targets_of_its_transcoders() -> None:
    transcoders = [Job("a:in/x", "a:in", 100, "a"), Job("b:in/x", "b:in", 90, "b"), Job("b:in/y", "b:in", 5, "a")]
    saes = [Job("a", "a", 1), Job("c", "c", 1)]
    one, two = plan(TopologyConfig(sae=SAETopology(groups=2)), [*transcoders, *saes], 64).groups
    assert (one.jobs, two.jobs) == ((0,), (1, 2, 3, 4))
    # Each activation once, whether it is one SAE's input or target or several's.
    assert one.hookpoints == ("a:in", "a")
    assert two.hookpoints == ("b:in", "a", "c", "b")


def test_jobs_of_one_hookpoint_stay_together_unless_a_group_would_be_empty() -> None:
    two_hookpoints = jobs(6, per_hookpoint=3)
    assert split_jobs(two_hookpoints, 2) == [[0, 1, 2], [3, 4, 5]]
    dealt = split_jobs(two_hookpoints, 5)
    assert sorted(itertools.chain(*dealt)) == list(range(6))
    assert all(dealt)
    with pytest.raises(UserError, match=r"topology\.sae\.groups: 7 groups for 6 SAEs"):
        split_jobs(two_hookpoints, 7)


def spread(sae_ranks: int, lm_ranks: int, each: int | None = None) -> TopologyConfig:
    lm = LMTopology(dp=lm_ranks, parallel="device_map", devices_per_rank=each)
    return TopologyConfig(lm=lm, sae=SAETopology(tp=sae_ranks))


@pytest.mark.parametrize(
    ("topology", "ranks", "gpus", "expected"),
    [
        # One GPU per rank, shared in turn where there are fewer.
        (TopologyConfig(lm=LMTopology(tp=2), sae=SAETopology(tp=2)), range(4), 4, [[0], [1], [2], [3]]),
        (TopologyConfig(lm=LMTopology(tp=2), sae=SAETopology(tp=2)), range(4), 3, [[0], [1], [2], [0]]),
        (TopologyConfig(lm=LMTopology(tp=4), sae=SAETopology(tp=4)), range(4, 8), 8, [[0], [1], [2], [3]]),
        # LM ranks share out evenly what SAE ranks leave...
        (spread(2, 1), range(3), 8, [[0], [1], [2, 3, 4, 5, 6, 7]]),
        (spread(2, 2), range(4), 8, [[0], [1], [2, 3, 4], [5, 6, 7]]),
        (spread(1, 2), range(3), 8, [[0], [1, 2, 3], [4, 5, 6]]),
        (spread(1, 1), range(2), 2, [[0], [1]]),
        # ... or have as many as they are given.
        (spread(2, 2, 2), range(4), 8, [[0], [1], [2, 3], [4, 5]]),
        # Two machines of 8 GPUs and 4 ranks each: all ranks of the first train SAEs, and two of the second.
        (spread(6, 2), range(4), 8, [[0], [1], [2], [3]]),
        (spread(6, 2), range(4, 8), 8, [[0], [1], [2, 3, 4], [5, 6, 7]]),
        (spread(4, 4), range(4, 8), 8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_gpus_of_ranks(topology: TopologyConfig, ranks: range, gpus: int, expected: list[list[int]]) -> None:
    assert [list(own) for own in gpus_of_ranks(topology, ranks, gpus)] == expected


@pytest.mark.parametrize(
    ("topology", "ranks", "gpus", "message"),
    [
        (spread(2, 1, 7), range(3), 8, "devices_per_rank: 7 for each of 1 LM .* are 9 GPUs, .* has 8; .* at most 6$"),
        (spread(4, 2, 3), range(6), 8, "devices_per_rank: 3 for each of 2 LM .* are 10 GPUs, .* has 8; .* at most 2$"),
        (spread(7, 2), range(9), 8, "parallel: device_map needs a GPU for each of 7 SAE ranks .* each of 2 LM ranks"),
        (spread(1, 1), range(2), 1, "a machine has 1; use more machines, or lower topology.lm.dp or topology.sae$"),
    ],
)
def test_too_few_gpus(topology: TopologyConfig, ranks: range, gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^topology.lm.*{message}") as error:
        gpus_of_ranks(topology, ranks, gpus)
    assert "\n" not in str(error.value)


def test_devices_are_counted_in_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert pick_devices(spread(1, 1), 1, 1) == (torch.device("cpu"),)
    with pytest.raises(UserError, match=r"devices_per_rank: 2 counts GPUs, and there are none here; remove it"):
        pick_devices(spread(1, 1, 2), 1, 1)


def test_wrong_number_of_ranks_names_both_and_a_command() -> None:
    topology = TopologyConfig(lm=LMTopology(tp=2), sae=SAETopology(tp=2))
    check_world_size(topology, 4, "-m scale_sae.train --config c.yaml")
    with pytest.raises(UserError, match=r"needs 4 ranks but 3 were started.*--num_processes 4 .*--config c\.yaml"):
        check_world_size(topology, 3, "-m scale_sae.train --config c.yaml")


def test_every_rank_of_a_world_that_does_not_exist() -> None:
    """Two SAE groups of dp x tp and two copies of the model, built rank by rank in this process."""
    laid_out = TopologyConfig(lm=LMTopology(tp=2, dp=2), sae=SAETopology(groups=2, dp=2, tp=4), engine="fsdp2")
    planned = plan(laid_out, jobs(4), 64)
    assert planned.world_size == 20
    for rank in range(planned.world_size):
        with fake_world(rank, planned.world_size) as store:
            place = build(planned, rank, torch.device("cpu"), "fake", store)
            group = planned.group_of(rank)
            assert place.group == group
            if group is None:
                assert place.lm_mesh is not None and place.lm_mesh.mesh.tolist() == list(planned.lm[(rank - 16) // 2])
                continue
            p, t = divmod(rank % 8, 4)
            assert (place.shard.rank, place.shard.size, place.shard.dp.rank, place.shard.dp.size) == (t, 4, p, 2)
            assert place.shard.group is not None and place.shard.dp.group is not None
            assert dist.get_process_group_ranks(place.shard.group) == list(group.ranks[4 * p : 4 * p + 4])
            assert dist.get_process_group_ranks(place.shard.dp.group) == list(group.ranks[t::4])
    assert not dist.is_initialized()
