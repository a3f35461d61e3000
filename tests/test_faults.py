"""Ranks and launchers that are lost: who says so, how soon the others end, and how a restart goes on. Real launches.

A launch takes ten seconds to its first step on two cores: more of them, and more kills, are in the slow part.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from harness import RankError, free_port
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
    for rank, known in ROLES.items():
        for role in (known, "starting up"):
            if line.startswith(
                f"error: lost rank {rank} (host {socket.gethostname()}, {role}): its process has ended."
            ):
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

EVERY = 8  # steps from checkpoint to checkpoint


def pids_of(machines: list[subprocess.Popen[str]]) -> list[int]:
    """The processes of all ranks that there are now, in rank order."""
    return [pid for process in machines for pid in runs.rank_pids(process)]


def restarts_of(output: str) -> int:
    """How often a launch went on from a checkpoint."""
    return output.count("going on from ")


def last_step(run_dir: Path) -> int:
    """The newest checkpoint's step, from which ranks that start now go on; 0 where there is none."""
    return max([checkpoint.step_of(folder) for folder in checkpoint.complete(run_dir)], default=0)


def wait_for_a_second_checkpoint(run_dir: Path, process: subprocess.Popen[str], begin: int, since: float) -> None:
    """Returns while it is in the making: after the first that ranks complete that went on from step ``begin``.

    Folders that ranks left behind that were killed before ``since`` are none.
    """

    def is_new(folder: Path) -> bool:
        try:
            return folder.stat().st_mtime > since
        except FileNotFoundError:  # complete by now
            return False

    until = time.monotonic() + A_MINUTE
    while last_step(run_dir) == begin or not any(map(is_new, (run_dir / "checkpoints").glob(".writing_*"))):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.0005)


class Chaos:
    """Kills random ranks of one run at random moments, one after the other."""

    def __init__(self, run_dir: Path):
        seed = random.randrange(1_000_000)
        print(f"seed {seed}")
        self.draw = random.Random(seed)
        self.run_dir = run_dir
        self.since = 0.0
        self.before: set[int] = set()

    def kill(self, machines: list[subprocess.Popen[str]], moment: str | None = None, victim: int | None = None) -> int:
        """Waits for a moment of the ranks that start or have just been started; returns the rank that it killed."""
        draw, first, begin = self.draw, machines[0], last_step(self.run_dir)
        moment = moment or draw.choices(["a checkpoint", "a step", "the start"], [2, 2, 1])[0]
        victim = draw.randrange(4) if victim is None else victim
        until = time.monotonic() + A_MINUTE
        while len(pids := pids_of(machines)) < 4 or self.before & set(pids):
            assert time.monotonic() < until
            time.sleep(0.05)
        delay = {"a checkpoint": 0.03, "a step": 0.1, "the start": 8.0}[moment] * draw.random()
        if moment != "the start":
            runs.wait_for_step(self.run_dir, begin + draw.randint(1, EVERY), first, since=self.since)
        if moment == "a checkpoint":
            wait_for_a_second_checkpoint(self.run_dir, first, begin, self.since)
        time.sleep(delay)
        unfinished = [folder.name for folder in (self.run_dir / "checkpoints").glob(".*_*")]
        os.kill(pids[victim], signal.SIGKILL)
        took = seconds_until_gone(pids)
        print(f"rank {victim}, {delay:.2f} s after {moment}, {unfinished} there; all ranks ended {took:.1f} s later")
        assert took < A_MINUTE
        self.since, self.before = time.time(), set(pids)
        return victim


def often(folder: Path) -> Path:
    """The long run, with a checkpoint and a line of metrics more often."""
    return long_config(folder, checkpoint={"every_steps": EVERY}, logging={"log_every_steps": 1})


def steps_of(run_dir: Path) -> list[int]:
    """The step of every line of the metrics."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def each_once(last: int) -> list[int]:
    """What `steps_of` finds where no step is lost and none is there twice."""
    return [step for step in range(1, last + 1) for _ in range(2)]  # two SAEs


# Rank 0 holds the lock of the folder, and is the one that completes checkpoints.
ONCE = [("a checkpoint", 0)]
MORE = [("the start", 1), ("a step", 3), ("a checkpoint", 1), ("the start", 0), ("a step", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [ONCE, MORE])
def test_the_launcher_restarts_lost_ranks(
    kills: list[tuple[str, int]], tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    process = runs.launch(often(tmp_path), 4, options=["--max_restarts", str(len(kills))])
    chaos = Chaos(tmp_path / "run")
    for moment, victim in kills:
        chaos.kill([process], moment, victim)
    code, output = runs.finish(process)
    assert code == 0, output[-3000:]
    named = [lost(line) for line in lines_of(output)]
    if kills == ONCE:
        assert named == [0] and restarts_of(output) == 1
    assert len(named) <= len(kills)  # one that is killed before it could say who it is, the launcher alone names
    assert "/gloo/" not in output  # no traceback of a lost connection
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)
    assert steps_of(tmp_path / "run") == each_once(STEPS)


def launch_on_two_machines(config: Path, world: int, *options: str) -> list[subprocess.Popen[str]]:
    """Two launchers, which are two machines to accelerate; they meet on loopback."""
    meet = ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    return [
        runs.launch(config, world, options=[*meet, "--machine_rank", str(machine), *options]) for machine in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8])
def test_two_launchers_restart_lost_ranks(kills: int, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """Whichever machine loses a rank, at whatever moment, both launchers start their ranks again, and these meet."""
    machines = launch_on_two_machines(often(tmp_path), 4, "--max_restarts", str(kills))
    chaos = Chaos(tmp_path / "run")
    victims = [chaos.kill(machines) for _ in range(kills)]
    ended = [runs.finish(process) for process in machines]
    assert [code for code, _ in ended] == [0, 0], "\n".join(output[-3000:] for _, output in ended)
    lines = lines_of("\n".join(output for _, output in ended))
    print(*lines, sep="\n")
    # A rank that is killed before it could say who it is has no line, or one of the machine on which it was.
    named = [lost(line) for line in lines if not line.startswith("error: the ranks on host ")]
    assert len(lines) <= kills and Counter(named) <= Counter(victims)
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)
    assert steps_of(tmp_path / "run") == each_once(STEPS)


def ip(*arguments: str, namespace: str | None = None) -> subprocess.CompletedProcess[str]:
    where = ["-n", namespace] if namespace else []
    return subprocess.run(["ip", *where, *arguments], capture_output=True, text=True)


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between their ``eth0``, whose addresses are 10.77.0.1 and 10.77.0.2."""
    names = (f"sae_{os.getpid()}_0", f"sae_{os.getpid()}_1")
    if shutil.which("ip") is None or any(ip("netns", "add", name).returncode for name in names):
        pytest.skip("no network namespace can be made here: a network that is cut is not tried")
    try:
        done = [ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])]
        for number, name in enumerate(names):
            done.append(ip("address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0", namespace=name))
            done += [ip("link", "set", device, "up", namespace=name) for device in ("lo", "eth0")]
        assert [one.stderr for one in done if one.returncode] == []
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_a_network_that_is_cut(networks: tuple[str, str], tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """Two machines with networks of their own. Nothing closes a connection; once it is mended, both go on."""
    meet = ["--num_machines", "2", "--main_process_ip", "10.77.0.1", "--main_process_port", "29500"]
    config = often(tmp_path)
    machines = [
        runs.launch(
            config,
            4,
            options=[*meet, "--machine_rank", str(number), "--max_restarts", "1"],
            within=["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"],
        )
        for number, name in enumerate(networks)
    ]
    runs.wait_for_step(tmp_path / "run", 20, machines[0])
    pids = pids_of(machines)
    ip("link", "set", "eth0", "down", namespace=networks[0])
    took = seconds_until_gone(pids)
    print(f"all ranks ended {took:.1f} s after the cut")
    assert took < A_MINUTE
    ip("link", "set", "eth0", "up", namespace=networks[0])
    ended = [runs.finish(process) for process in machines]
    assert [code for code, _ in ended] == [0, 0], "\n".join(output[-3000:] for _, output in ended)
    (first,), (second,) = [lines_of(output) for _, output in ended]  # neither can know what the other one says
    print(first, second, sep="\n")
    assert first.startswith("error: lost rank ") and "gave no sign of life for 30 s" in first
    assert "the store at 10.77.0.1:29500 is gone" in second
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)
    assert steps_of(tmp_path / "run") == each_once(STEPS)


@pytest.mark.slow
def test_chaos(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    """One command, started again after every kill of a random rank at a random moment, ends in the quiet run's release.

    20 kills, each about 8 steps after the one before, leave some of the steps.
    """
    config, chaos = often(tmp_path), Chaos(tmp_path / "run")
    for _ in range(20):
        process = runs.launch(config, 4)
        victim = chaos.kill([process])
        code, output = runs.finish(process)
        assert code != 0
        assert [lost(line) for line in lines_of(output)] in ([victim], [])
    code, output = runs.finish(runs.launch(config, 4))
    assert code == 0, output[-3000:]
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)
    assert steps_of(tmp_path / "run") == each_once(STEPS)
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


# ---- non-finite values -----------------------------------------------------------------------------------------------


def test_a_run_whose_every_sae_diverges_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tree = runs.tiny_config(
        tmp_path,
        # The first step makes the weights so large that pre-activations overflow float32.
        saes=[{"d_sae": 256, "k": 8, "lr": 1e38}],
        model={"name": "embedded"},
        topology=runs.TOPOLOGIES["SAE tp=4"][0],
    )
    with pytest.raises(RankError, match="exit code 1"):
        runs.forked_run(runs.write_config(tmp_path, tree), 5)
    (line,) = lines_of(capfd.readouterr().err)
    assert line.startswith("error: train.lr: every SAE has diverged by step ")
    assert line.endswith("(non-finite values); lower it, or raise train.lr_warm_up_steps")


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """The first one, which is far from its end, goes on."""
    train = {"training_tokens": 10**6, "train_batch_size_tokens": 128, "lr": 1e-3}
    config = long_config(tmp_path, train=train, logging={"log_every_steps": 1})
    runs.write_texts(tmp_path / "texts.jsonl", 200)
    first = runs.launch(config, 4)
    runs.wait_for_step(tmp_path / "run", 20, first)
    code, output = runs.finish(runs.launch(config, 4))
    (line,) = lines_of(output)
    assert code != 0 and line.startswith(f"error: output_dir: {tmp_path}/run is in use by another run")
    steps = steps_of(tmp_path / "run")
    runs.wait_for_step(tmp_path / "run", steps[-1] + 20, first)
    (tmp_path / "run/stop").touch()
    code, output = runs.finish(first)
    assert code == 0, output[-3000:]
    steps = steps_of(tmp_path / "run")
    assert steps == each_once(steps[-1]) and last_step(tmp_path / "run") == steps[-1]
