"""Ranks and launchers that are lost: who says so, how soon the others end, and how a restart goes on. Real launches."""

import json
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

import runs
from harness import free_port
from scale_sae import checkpoint
from test_survival import STEPS, check_same_release, long_config

# The promise; what is lost is mostly noticed much sooner.
A_MINUTE = 60.0


def seconds_until_gone(pids: list[int]) -> float:
    """Waits until none of the processes runs any more; one that is stopped does not run."""

    def runs_on(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZXT"
        except (FileNotFoundError, ProcessLookupError):
            return False

    begin = time.monotonic()
    while any(runs_on(pid) for pid in pids) and time.monotonic() - begin < 2 * A_MINUTE:
        time.sleep(0.05)
    return time.monotonic() - begin


def lines_of(output: str) -> list[str]:
    """The lines of an output that speak of errors of this package; a progress bar writes over its own line."""
    return [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error")]


ROLES = {
    0: "SAE rank 0 of group 0, tp 0",
    1: "SAE rank 1 of group 0, tp 1",
    2: "LM rank of replica 0, tp 0",
    3: "LM rank of replica 0, tp 1",
}


def lost(line: str) -> int:
    """The rank that a line names as lost by its process's end, with its host and role."""
    for rank, role in ROLES.items():
        if line.startswith(f"error: lost rank {rank} (host {socket.gethostname()}, {role}): its process has ended."):
            return rank
    raise AssertionError(line)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_is_named_and_all_others_end(victim: int, tmp_path: Path) -> None:
    process = runs.launch(long_config(tmp_path), 4)
    runs.wait_for_step(tmp_path / "run", 20, process)
    pids = runs.rank_pids(process)
    os.kill(pids[victim], signal.SIGSTOP)
    took = seconds_until_gone(pids)
    code, output = runs.finish(process)  # the launcher kills the stopped one
    print(f"all other ranks ended {took:.1f} s after the stop")
    assert took < A_MINUTE and code != 0
    (line,) = lines_of(output)
    assert f"lost rank {victim} (host " in line and ROLES[victim] in line and "gave no sign of life for 30 s" in line


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_ranks_end_without_the_launcher_that_holds_the_store(how: signal.Signals, tmp_path: Path) -> None:
    """SIGSTOP stands for a machine that lost power: connections stay open, and nothing answers."""
    process = runs.launch(long_config(tmp_path), 4)
    runs.wait_for_step(tmp_path / "run", 20, process)
    pids = runs.rank_pids(process)
    os.kill(process.pid, how)
    took = seconds_until_gone(pids)
    os.kill(process.pid, signal.SIGKILL)
    _, output = runs.finish(process)
    print(f"all ranks ended {took:.1f} s after {how.name} to the launcher")
    assert took < A_MINUTE
    (line,) = lines_of(output)
    assert "lost the launcher of rank 0" in line


# ---- restarts --------------------------------------------------------------------------------------------------------


def restarts_of(output: str) -> int:
    """How often a launch went on from a checkpoint."""
    return output.count("going on from ")


def test_the_launcher_restarts_lost_ranks(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    process = runs.launch(long_config(tmp_path), 4, options=["--max_restarts", "3"])
    for step, victim in [(70, 1), (170, 0), (270, 3)]:
        runs.wait_for_step(tmp_path / "run", step, process)
        pids = runs.rank_pids(process)
        os.kill(pids[victim], signal.SIGKILL)
        took = seconds_until_gone(pids)
        print(f"all ranks ended {took:.1f} s after the kill of rank {victim}")
        # Those beside it look every 0.2 s; the rest is for a busy machine.
        assert took < 10
    code, output = runs.finish(process)
    assert code == 0, output[-3000:]
    assert [lost(line) for line in lines_of(output)] == [1, 0, 3]
    assert "/gloo/" not in output  # no traceback of a lost connection
    assert restarts_of(output) == 3
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)


def launch_on_two_machines(config: Path, world: int, *options: str) -> list[subprocess.Popen[str]]:
    """Two launchers, which are two machines to accelerate; they meet on loopback."""
    meet = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return [
        runs.launch(config, world, options=[*meet, "--machine_rank", str(machine), *options]) for machine in range(2)
    ]


KILLS = [(70, 0, 1), (170, 1, 0), (270, 0, 0)]  # step, machine, rank on it


@pytest.mark.parametrize("kills", [KILLS[:1], pytest.param(KILLS[1:], marks=pytest.mark.slow)])
def test_two_launchers_restart_lost_ranks(
    kills: list[tuple[int, int, int]], tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """Whichever machine loses a rank, both launchers start their ranks again, and these meet."""
    machines = launch_on_two_machines(long_config(tmp_path), 4, "--max_restarts", "3")
    for step, machine, victim in kills:
        runs.wait_for_step(tmp_path / "run", step, machines[0])
        pids = [runs.rank_pids(process) for process in machines]
        os.kill(pids[machine][victim], signal.SIGKILL)
        took = seconds_until_gone([pid for found in pids for pid in found])
        print(f"all ranks ended {took:.1f} s after the kill of rank {victim} on machine {machine}")
        assert took < A_MINUTE
    ended = [runs.finish(process) for process in machines]
    assert [code for code, _ in ended] == [0, 0], "\n".join(output[-3000:] for _, output in ended)
    lines = lines_of("\n".join(output for _, output in ended))
    assert sorted(map(lost, lines)) == sorted(2 * machine + victim for _, machine, victim in kills)
    assert restarts_of(ended[0][1]) == len(kills)
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)


# ---- chaos -----------------------------------------------------------------------------------------------------------


def last_step(run_dir: Path) -> int:
    """The newest checkpoint's step, from which the next launch goes on; 0 where there is none."""
    return max([checkpoint.step_of(folder) for folder in checkpoint.complete(run_dir)], default=0)


def wait_for_a_checkpoint_in_the_making(run_dir: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + A_MINUTE
    while not any((run_dir / "checkpoints").glob(".writing_*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.0005)


def kill_at_random(process: subprocess.Popen[str], run_dir: Path, draw: random.Random) -> str:
    """Kills one rank at a random moment of this launch, in half of the cases while a checkpoint is written."""
    begin, victim = last_step(run_dir), draw.randrange(4)
    if draw.random() < 0.5:
        runs.wait_for_step(run_dir, begin + 1, process)
        wait_for_a_checkpoint_in_the_making(run_dir, process)
        when, delay = "while a checkpoint is written", draw.uniform(0, 0.03)
    else:
        steps = draw.randint(1, 15)
        runs.wait_for_step(run_dir, begin + steps, process)
        when, delay = f"{steps} steps after step {begin}", draw.uniform(0, 0.1)
    pids = runs.rank_pids(process)
    time.sleep(delay)
    unfinished = [path.name for path in (run_dir / "checkpoints").glob(".*_*")]
    os.kill(pids[victim], signal.SIGKILL)
    code, output = runs.finish(process)
    assert code != 0
    (line,) = lines_of(output)
    assert lost(line) == victim
    return f"rank {victim} {when}, {unfinished or 'nothing'} unfinished"


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_chaos(kills: int, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """One command, started again after every kill of a random rank at a random moment, ends in the quiet run's release.

    20 kills, each at most 15 steps after the one before or at the next checkpoint, leave some of the 400 steps.
    """
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    draw = random.Random(seed)
    config = long_config(tmp_path, checkpoint={"every_steps": 12}, logging={"log_every_steps": 1})
    for number in range(kills):
        print(f"kill {number + 1}: {kill_at_random(runs.launch(config, 4), tmp_path / 'run', draw)}")
    code, output = runs.finish(runs.launch(config, 4))
    assert code == 0, output[-3000:]
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [step for step in range(1, STEPS + 1) for _ in range(2)]  # two SAEs, no step lost or twice
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


# ---- non-finite values -----------------------------------------------------------------------------------------------


def test_a_run_whose_every_sae_diverges_says_so(tmp_path: Path) -> None:
    config = long_config(tmp_path, train={"training_tokens": STEPS * 128, "train_batch_size_tokens": 128, "lr": 1e38})
    code, output = runs.finish(runs.launch(config, 4))
    (line,) = lines_of(output)
    assert code != 0 and line.startswith("error: train.lr: every SAE has diverged by step ")
    assert line.endswith("(non-finite values); lower it, or raise train.lr_warm_up_steps")


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    config = long_config(tmp_path)
    first = runs.launch(config, 4)
    runs.wait_for_step(tmp_path / "run", 20, first)
    second = runs.launch(config, 4)
    code, output = runs.finish(second)
    (line,) = lines_of(output)
    assert code != 0 and line.startswith(f"error: output_dir: {tmp_path}/run is in use by another run")
    assert first.poll() is None, "it was to be refused while the first still ran"
    code, output = runs.finish(first)
    assert code == 0, output[-3000:]
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)
