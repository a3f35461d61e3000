"""The sbatch scripts on a real Slurm of two nodes: a job that is cut, requeued, finished, and its release.

It takes about eight minutes: Slurm's time limits are whole minutes, and it lets a requeued job wait for two.
Two ``slurmd -N`` on one machine will do; 2 processes run on each node.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import runs
from harness import free_port
from scale_sae import checkpoint
from test_survival import check_same, consolidate, long_config, released

# More than a machine trains within the 90 s after which the signal comes at the latest.
STEPS = 4000
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "OUT_OF_MEMORY")

Submit = Callable[..., str]


def output_of(*command: str, **environment: str) -> str:
    done = subprocess.run(command, cwd=runs.ROOT, env=runs.environment() | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def config_of(folder: Path) -> Path:
    """The long run of test_survival.py, made long enough to be cut."""
    folder.mkdir()
    config = long_config(
        folder,
        train={"training_tokens": STEPS * 128, "train_batch_size_tokens": 128, "lr": 1e-3},
        checkpoint={"every_steps": 500},
    )
    runs.write_texts(folder / "texts.jsonl", 200)
    return config


def state_of(job: str) -> dict[str, str]:
    """What Slurm knows of a job: ``JobState``, ``Restarts``, ..."""
    return dict(re.findall(r"(\w+)=(\S*)", output_of("scontrol", "show", "job", job)))


def text_of(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""  # it may end within a character


def wait_for(job: str, log: Path, happened: Callable[[dict[str, str]], bool], minutes: float) -> dict[str, str]:
    """Returns the state of the job in which ``happened`` is true."""
    until = time.monotonic() + 60 * minutes
    while not happened(state := state_of(job)):
        assert time.monotonic() < until and state["JobState"] not in ENDED, f"{state}\n{text_of(log)[-3000:]}"
        time.sleep(1)
    return state


@pytest.fixture
def submit() -> Iterator[Submit]:
    """``sbatch``, which returns the job's number; jobs that are still there when the test ends are cancelled."""
    if shutil.which("sbatch") is None or subprocess.run(["scontrol", "ping"], capture_output=True).returncode != 0:
        pytest.skip("no Slurm runs here: slurm/*.sbatch are not tried; it needs sbatch and two idle nodes")
    nodes = set(output_of("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())
    if len(nodes) < 2:
        pytest.skip(f"Slurm has {len(nodes)} idle nodes: slurm/*.sbatch are not tried, which needs two")
    jobs: list[str] = []

    def run(*options: str, **settings: str) -> str:
        jobs.append(output_of("sbatch", "--parsable", *options, VENV=sys.prefix, **settings).strip())
        return jobs[-1]

    yield run
    subprocess.run(["scancel", *jobs], capture_output=True)


@pytest.mark.slow
def test_a_job_that_is_cut_before_its_time_limit_goes_on(submit: Submit, tmp_path: Path) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    log = tmp_path / "log"
    job = submit(
        *["--nodes=2", "--gpus-per-node=0", "--time=2", "--signal=B:USR1@30", f"--output={log}", "slurm/train.sbatch"],
        CONFIG=str(config_of(cut)),
        RUN_DIR=str(cut / "run"),
        PROCESSES_PER_NODE="2",
        MAIN_ADDRESS="127.0.0.1",
        MAIN_PORT=str(free_port()),
        ACCELERATE_CONFIG="launch/cpu.yaml",
    )
    # It waits for the end of the training, however often that is requeued.
    release = submit(
        *[f"--dependency=afterok:{job}", "--cpus-per-task=1", "--mem=1G", f"--output={tmp_path}/release_log"],
        "slurm/consolidate.sbatch",
        RUN_DIR=str(cut / "run"),
        OUT=str(cut / "release"),
    )
    wait_for(job, log, lambda state: state["Restarts"] == "1", minutes=4)
    (stop,) = re.findall(r"stopped at step (\d+) as asked", text_of(log))
    print(f"cut at step {stop}")
    assert 0 < int(stop) < STEPS
    # Once is enough.
    output_of("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    # While the job waits.
    code, output = runs.finish(runs.launch(config_of(whole), 4), 900)
    assert code == 0, output[-3000:]
    expected = consolidate(whole / "run", whole / "release")
    state = wait_for(job, log, lambda state: state["JobState"] == "COMPLETED", minutes=15)
    assert state["Restarts"] == "1"
    assert f"going on from {cut}/run/checkpoints/step_{int(stop):08d}" in text_of(log)
    assert checkpoint.step_of(checkpoint.complete(cut / "run")[0]) == STEPS
    wait_for(release, tmp_path / "release_log", lambda state: state["JobState"] == "COMPLETED", minutes=5)
    check_same(released(cut / "release"), expected)
