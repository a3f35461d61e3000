"""Runs a function on real gloo processes of this machine: what every distributed test is built on.

    def worker(rank: int, world: int, scale: float) -> torch.Tensor:
        x = torch.full((3,), scale * rank)
        dist.all_reduce(x)
        return x

    results = run_ranks(4, worker, 2.0)

The ranks are forked (0.1 s for four, against 4 s for spawned ones), so the function may be a closure and sees whatever
the test has already made. A parent that ran a multi-threaded operation hangs its children, so tests use one thread.
"""

import faulthandler
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scale_sae.kernels import workspace


class RankError(RuntimeError):
    """A rank failed: the message holds the traceback of the one that failed first, ``rank`` is its number."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120, init: bool = True) -> list[Any]:
    """Call ``fn(rank, world, *args)`` on ``world`` forked processes and return the results in rank order.

    With ``init`` the default process group (gloo) exists when ``fn`` starts. Without it ``fn`` forms its own, from the
    variables that a launcher sets: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR``, ``MASTER_PORT`` (free).

    Args:
        world: number of processes.
        fn: any callable; its result must be picklable (tensors are).
        timeout: seconds until all ranks must have returned.

    Raises:
        RankError: a rank raised or died; the others are killed.
        TimeoutError: the ranks did not return in time; holds the stack of each one that was still running.
    """
    assert torch.get_num_threads() == 1, "call torch.set_num_threads(1) before the first operation, as conftest.py does"
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        folder, port = Path(name), free_port()
        context = multiprocessing.get_context("fork")
        ranks: list[BaseProcess] = [
            context.Process(target=_rank_main, args=(folder, port, rank, world, fn, args, timeout, init))
            for rank in range(world)
        ]
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of any fork beside threads; the ones here (torch's idle pools) hold no locks.
                warnings.simplefilter("ignore", DeprecationWarning)
                for process in ranks:
                    process.start()
            _join(ranks, folder, timeout)
            return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(world)]
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def renew_thread_pool() -> None:
    """Makes torch replace the pool that a fork has broken. Threads that did so together would race for it."""
    torch.set_num_threads(1)


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(ranks: list[BaseProcess], folder: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout + 2  # the ranks write their stacks at `timeout`
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait(list(running), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(sentinel, int)
            # The sentinel is a pipe, which closes a little before there is an exit code.
            running.pop(sentinel).join()
        if any(process.exitcode for process in ranks):
            raise _first_error(ranks, folder)
        if running and time.monotonic() > deadline:
            stacks = [_stack(folder, rank) for rank, process in enumerate(ranks) if process.is_alive()]
            raise TimeoutError(f"{len(stacks)} of {len(ranks)} ranks still ran after {timeout} s\n" + "\n".join(stacks))


def _first_error(ranks: list[BaseProcess], folder: Path) -> RankError:
    """The earliest failure: those that follow are mostly peers that lost their connection to it."""
    errors = sorted(folder.glob("error_*"), key=lambda path: path.stat().st_mtime_ns)
    killed = [rank for rank, process in enumerate(ranks) if (process.exitcode or 0) < 0]
    if killed:
        rank = killed[0]
        text = f"died with exit code {ranks[rank].exitcode}\n" + _stack(folder, rank)
    elif errors:
        rank, text = int(errors[0].name.removeprefix("error_")), "failed\n" + errors[0].read_text()
    else:
        rank = next(rank for rank, process in enumerate(ranks) if process.exitcode)
        text = f"left with exit code {ranks[rank].exitcode}"
    return RankError(rank, f"rank {rank} of {len(ranks)} {text}")


def _stack(folder: Path, rank: int) -> str:
    """What faulthandler wrote for ``rank``, without the frames of the parent that it was forked from."""
    lines = (folder / f"stack_{rank}").read_text().splitlines()
    own = [line for line in lines if not any(part in line for part in ("/_pytest/", "/pluggy/", "/multiprocessing/"))]
    return "\n".join([f"--- rank {rank}", *own])


def _rank_main(
    folder: Path,
    port: int,
    rank: int,
    world: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
    init: bool,
) -> None:
    stack = (folder / f"stack_{rank}").open("w")
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(timeout, file=stack)
    renew_thread_pool()
    workspace._kept.__dict__.clear()  # what steps in the parent have left, so that a rank's memory is all its own
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        if init:
            dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
        result = fn(rank, world, *args)
        torch.save(result, folder / f"result_{rank}")
        if init:
            dist.barrier()  # no rank closes its connections while another still uses them
        if dist.is_initialized():
            dist.destroy_process_group()
    except Exception:
        aside = folder / f"aside_{rank}"
        aside.write_text(traceback.format_exc())
        aside.rename(folder / f"error_{rank}")
        sys.stdout.flush()
        os._exit(1)  # threads that the failure left behind must not keep the process alive
