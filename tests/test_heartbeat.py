"""The watch over other ranks, by itself: real processes and a real store, with beats of 0.06 s instead of 3 s."""

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from harness import free_port
from scale_sae import heartbeat
from scale_sae.config import RunConfig, from_dict
from scale_sae.heartbeat import Heartbeat, is_lost_connection, role_of
from scale_sae.topology import Job, plan

WORLD = 4
SILENCE = 0.6


def beat_fast() -> None:
    """As many beats and looks to a silence as in a run."""
    heartbeat.BEAT, heartbeat.SILENCE, heartbeat.TICK = SILENCE / 10, SILENCE, 0.01


def exit_codes(live: Callable[[int, Heartbeat], None], together: bool, hangs: int | None = None) -> list[int | None]:
    """Lets four ranks live, on one machine or each on its own; None: did not end within 15 s, or is the one that hangs.

    The store lives in a process of its own, as it lives in the launcher of a run. In this one, its threads could hold
    a lock of the C library at the moment of a fork, and the rank would wait for it forever.
    """
    port = free_port()

    def store_main() -> None:
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        store.wait(["never"], timedelta(seconds=60))

    def rank_main(rank: int) -> None:
        beat_fast()
        local = (rank, WORLD) if together else (0, 1)
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(local[0]), LOCAL_WORLD_SIZE=str(local[1])
        )
        pulse = Heartbeat(rank, WORLD, local[0])
        pulse.introduce(f"role {rank}")
        live(rank, pulse)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(WORLD)]
    store = context.Process(target=store_main)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in harness.run_ranks
        for process in (store, *ranks):
            process.start()
    until = time.monotonic() + 15
    for rank, process in enumerate(ranks):
        if rank != hangs:
            process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in (store, *ranks):
        process.kill()
        process.join()
    return codes


def lines(capfd: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line]


# Rank 0 is watched by all others, each of which it watches.
LOST = [
    (0, signal.SIGKILL, True),
    (2, signal.SIGKILL, True),
    (2, signal.SIGKILL, False),
    (0, signal.SIGSTOP, False),
    (2, signal.SIGSTOP, True),
]


@pytest.mark.parametrize(("victim", "how", "together"), LOST)
def test_a_lost_rank(victim: int, how: signal.Signals, together: bool, capfd: pytest.CaptureFixture[str]) -> None:
    def live(rank: int, pulse: Heartbeat) -> None:
        time.sleep(2 * SILENCE if rank == victim else 60)  # a main thread in a collective that never returns
        os.kill(os.getpid(), how)

    codes = exit_codes(live, together, victim if how == signal.SIGSTOP else None)
    assert [code for rank, code in enumerate(codes) if rank != victim] == [1, 1, 1]
    assert codes[victim] == (None if how == signal.SIGSTOP else -how)
    (line,) = lines(capfd)
    seen = together and how == signal.SIGKILL
    assert line.startswith(f"error: lost rank {victim} (host ") and f", role {victim}): " in line
    assert ("its process has ended" if seen else f"gave no sign of life for {SILENCE:.0f} s") in line


@pytest.mark.parametrize("together", [True, False])
def test_a_rank_that_ended_well_is_not_missed(together: bool, capfd: pytest.CaptureFixture[str]) -> None:
    def live(rank: int, pulse: Heartbeat) -> None:
        time.sleep(SILENCE)
        pulse.leave()
        time.sleep(0 if rank else 3 * SILENCE)
        pulse.stop()

    assert exit_codes(live, together) == [0] * WORLD
    assert lines(capfd) == []


def test_the_first_fault_is_the_one_that_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    """Main threads that never return end too; none of them and no thread adds a word."""

    def live(rank: int, pulse: Heartbeat) -> None:
        time.sleep(SILENCE if rank == 3 else 60)
        pulse.report("error: something of rank 3")
        os._exit(1)

    assert exit_codes(live, together=True) == [1] * WORLD
    assert lines(capfd) == ["error: something of rank 3"]


def test_ranks_that_only_lost_a_connection_leave_it_to_the_watch(capfd: pytest.CaptureFixture[str]) -> None:
    def live(rank: int, pulse: Heartbeat) -> None:
        time.sleep(SILENCE)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        pulse.await_verdict()
        pulse.report("error: a traceback")
        os._exit(1)

    assert exit_codes(live, together=False, hangs=1) == [1, None, 1, 1]
    (line,) = lines(capfd)
    assert line.startswith("error: lost rank 1 ")


def test_a_restart_elsewhere_ends_the_ranks_of_the_attempt_before() -> None:
    def live(rank: int, pulse: Heartbeat) -> None:
        pulse.stop()
        pulse = Heartbeat(rank, WORLD, 0)  # that attempt's ranks are in their second session
        if rank == 2:
            os.environ.update(TORCHELASTIC_RESTART_COUNT="2", GROUP_WORLD_SIZE="4")
            Heartbeat(rank, WORLD, 0)
        time.sleep(2 if rank == 2 else 60)

    assert exit_codes(live, together=False) == [1, 1, 1, 1]  # rank 2 plays both attempts in one process


def test_a_session_after_another(capfd: pytest.CaptureFixture[str]) -> None:
    """In one process, as runners have them: it knows nothing of the silence and the fault that the first one left.

    Every rank has the first one's error and goes on; the watch of a rank, which reads of the fault too, lets it.
    """

    def live(rank: int, pulse: Heartbeat) -> None:
        heartbeat.BEAT, heartbeat.SILENCE = 1.0, 10.0
        pulse.store.set(f"slow/{rank}", "1")
        if rank == 3:
            pulse.store.wait([f"slow/{rank}" for rank in range(WORLD)])
            pulse.report("error: something that every rank raises")
        while not pulse.store.check(["fault"]):
            time.sleep(0.01)
        watch = threading.Thread(target=pulse._beat)  # it has seen the fault now, and ends the rank after a beat
        watch.start()
        time.sleep(0.1)
        pulse.stop()
        watch.join()
        beat_fast()
        if rank == 0:
            time.sleep(1.3 * SILENCE)
        second = Heartbeat(rank, WORLD, rank)
        time.sleep(0 if rank == 0 else 1.4 * SILENCE)
        second.leave()
        second.stop()

    assert exit_codes(live, together=True) == [0] * WORLD
    assert lines(capfd) == ["error: something that every rank raises"]


def test_a_job_that_was_suspended_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    """Slurm suspends all processes of a job by SIGSTOP, and resumes them later."""

    def live(rank: int, pulse: Heartbeat) -> None:
        if rank == 0:
            beside = sorted(pulse.pids.values())
            until = time.monotonic() + SILENCE
            while len(beside) < WORLD - 1 and time.monotonic() < until:
                beside = sorted(pulse.pids.values())
            if os.fork() == 0:
                time.sleep(SILENCE)
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    for pid in [os.getppid(), *beside]:
                        os.kill(pid, number)
                    time.sleep(3 * SILENCE)
                os._exit(0)
        time.sleep(6 * SILENCE)
        pulse.leave()
        time.sleep(2 * SILENCE)
        pulse.stop()

    assert exit_codes(live, together=True) == [0] * WORLD
    assert lines(capfd) == []


def test_a_store_that_no_longer_answers(capfd: pytest.CaptureFixture[str]) -> None:
    """As where the machine of the launcher lost power: connections stay open. Rank 0's process holds this one."""
    port = free_port()

    def live(rank: int) -> None:
        beat_fast()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        pulse = Heartbeat(rank, 3, 0)
        time.sleep(2 * SILENCE if rank == 0 else 60)
        os.kill(os.getpid(), signal.SIGSTOP)
        pulse.stop()
        del store

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=live, args=(rank,)) for rank in range(3)]
    for process in ranks:
        process.start()
    for process in ranks[1:]:
        process.join(15)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
        process.join()
    assert codes == [None, 1, 1]
    said = [line for line in lines(capfd) if line.startswith("error")]
    assert len(said) == 1 and f"the store at 127.0.0.1:{port} is gone" in said[0]


def test_roles() -> None:
    def config(topology: dict[str, object]) -> RunConfig:
        return from_dict({"hookpoints": ["a", "b"], "saes": [{"d_sae": 64, "k": 4}], "topology": topology})

    def roles(topology: Any, rank: int) -> str:
        jobs = [Job("a", "a", 1), Job("b", "b", 1)]
        return role_of(plan(config(topology).topology, jobs, 64), rank)

    dedicated = {"lm": {"tp": 2}, "sae": {"groups": 2, "tp": 2}}
    assert roles(dedicated, 3) == "SAE rank 1 of group 1, tp 1"
    assert roles(dedicated, 5) == "LM rank of replica 0, tp 1"


def test_lost_connections() -> None:
    assert is_lost_connection(RuntimeError("[/__w/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"))
    assert is_lost_connection(dist.DistBackendError("NCCL error: remote process exited"))
    assert not is_lost_connection(RuntimeError("CUDA out of memory"))
