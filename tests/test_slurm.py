"""``slurm/train.sbatch`` on a real Slurm of two nodes, on which 2 processes each may run: cut, requeued, finished.

It takes about seven minutes; for two of them Slurm lets a requeued job wait. Two ``slurmd -N`` on one machine will do.
"""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
from harness import free_port
from scale_sae import checkpoint
from test_survival import check_same_release, consolidate, long_config

SLURM = shutil.which("sbatch") is not None
STEPS = 4500


def output_of(*command: str, **environment: str) -> str:
    done = subprocess.run(command, cwd=runs.ROOT, env=runs.environment() | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def config_of(folder: Path) -> Path:
    """The long run of test_survival.py, made long enough to be cut."""
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


@pytest.mark.slow
@pytest.mark.skipif(not SLURM, reason="no Slurm here: slurm/train.sbatch is not tried; it needs sbatch and two nodes")
def test_a_job_that_is_cut_before_its_time_limit_goes_on(tmp_path: Path) -> None:
    nodes = output_of("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
    if len(set(nodes)) < 2:
        pytest.skip(f"Slurm has {len(set(nodes))} idle nodes: slurm/train.sbatch is not tried, which needs two")
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    cut.mkdir()
    whole.mkdir()
    log = cut / "log"
    job = output_of(
        *["sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--time=3", "--signal=B:USR1@90"],
        *[f"--output={log}", "slurm/train.sbatch"],
        CONFIG=str(config_of(cut)),
        RUN_DIR=str(cut / "run"),
        VENV=sys.prefix,
        PROCESSES_PER_NODE="2",
        MAIN_ADDRESS="127.0.0.1",
        MAIN_PORT=str(free_port()),
        ACCELERATE_CONFIG="launch/cpu.yaml",
    ).strip()
    try:
        until = time.monotonic() + 2400
        while (state := state_of(job))["JobState"] not in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED"):
            assert time.monotonic() < until, f"{state}\n{log.read_text()[-3000:]}"
            time.sleep(2)
    finally:
        subprocess.run(["scancel", job], capture_output=True)
    output = log.read_text()
    assert state["JobState"] == "COMPLETED" and int(state["Restarts"]) >= 1, f"{state}\n{output[-3000:]}"
    stops = [int(step) for step in re.findall(r"stopped at step (\d+) as asked", output)]
    print(f"cut at steps {stops}; {state['Restarts']} restarts")
    assert stops and 0 < stops[0] < STEPS
    assert f"going on from {cut}/run/checkpoints/step_{stops[0]:08d}" in output
    assert checkpoint.step_of(checkpoint.complete(cut / "run")[0]) == STEPS
    code, output = runs.finish(runs.launch(config_of(whole), 4), 900)
    assert code == 0, output[-3000:]
    check_same_release(cut / "run", cut / "release", consolidate(whole / "run", whole / "release"))
