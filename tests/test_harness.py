"""The harness must report what it is there to find: a failing, a dying and a hanging rank."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from harness import RankError, run_ranks


def test_results_come_in_rank_order() -> None:
    def worker(rank: int, world: int, scale: float) -> dict[str, object]:
        total = torch.tensor(float(rank))
        dist.all_reduce(total)
        return {"rank": rank, "x": torch.full((2,), scale * rank, requires_grad=True), "total": total.item()}

    results = run_ranks(3, worker, 0.5)
    assert [r["rank"] for r in results] == [0, 1, 2] and [r["total"] for r in results] == [3, 3, 3]
    assert torch.equal(results[2]["x"], torch.ones(2))


def test_without_init_the_launchers_variables_are_set() -> None:
    def worker(rank: int, world: int) -> tuple[int, int]:
        assert not dist.is_initialized()
        dist.init_process_group("gloo")
        return dist.get_rank(), dist.get_world_size()

    assert run_ranks(2, worker, init=False) == [(0, 2), (1, 2)]


def test_the_rank_that_failed_first_is_named() -> None:
    def worker(rank: int, world: int) -> None:
        if rank == 1:
            raise ValueError("the cause")
        dist.barrier()  # fails, or would wait forever

    with pytest.raises(RankError, match="the cause") as caught:
        run_ranks(3, worker)
    assert caught.value.rank == 1


def test_a_killed_rank_is_named() -> None:
    def worker(rank: int, world: int) -> None:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RankError, match="exit code -9") as caught:
        run_ranks(3, worker)
    assert caught.value.rank == 2


def test_a_hang_ends_with_the_stack_of_every_rank() -> None:
    def worker(rank: int, world: int) -> None:
        if rank == 0:
            time.sleep(60)
        dist.barrier()

    with pytest.raises(TimeoutError, match=r"(?s)rank 0.*test_harness.*rank 1.*barrier"):
        run_ranks(2, worker, timeout=1)
