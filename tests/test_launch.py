"""The accelerate configs of ``launch/``: what they start, and what a run says that was started with the wrong one."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

import runs
from scale_sae import checkpoint

CONFIGS = sorted((runs.ROOT / "launch").glob("*.yaml"))
DEEPSPEED = ["--config_file", str(runs.ROOT / "launch/deepspeed_zero1.yaml")]


def test_every_config_is_in_the_readme() -> None:
    readme = (runs.ROOT / "README.md").read_text()
    assert len(CONFIGS) >= 4
    for path in [*CONFIGS, *sorted((runs.ROOT / "launch/deepspeed").glob("*.json"))]:
        assert str(path.relative_to(runs.ROOT)) in readme


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"] > 1
    if "deepspeed" in path.stem:
        file = runs.ROOT / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(file.read_text())["zero_optimization"]["stage"] == 1


def config_of(folder: Path, **topology: Any) -> Path:
    config = runs.tiny_config(
        folder,
        # Two parameters that dp ranks do not divide, in processes whose strings hash differently.
        hookpoints=["model.layers.0"],
        saes=[{"architecture": "batchtopk_skip_transcoder", "hookpoint_out": "model.layers.1", "d_sae": 256, "k": 8}],
        train={"training_tokens": 20 * 128, "train_batch_size_tokens": 128},
        topology={"lm": "colocated", "sae": {"dp": 2}, **topology},
    )
    return runs.write_config(folder, config)


def test_deepspeed_as_accelerate_starts_it(tmp_path: Path) -> None:
    # The file names the JSON from the root of the repository, which is where its launch line is to be typed.
    (tmp_path / "launch").symlink_to(runs.ROOT / "launch")
    code, output = runs.finish(runs.launch(config_of(tmp_path, engine="deepspeed"), 2, options=DEEPSPEED))
    assert code == 0, output[-3000:]
    assert checkpoint.step_of(checkpoint.complete(tmp_path / "run")[0]) == 20


@pytest.mark.parametrize(
    ("options", "engine", "said"),
    [
        (DEEPSPEED, "fsdp2", "topology.engine: 'fsdp2', but accelerate was asked for DeepSpeed"),
        (["--use_fsdp"], "deepspeed", "topology.engine: 'deepspeed', but accelerate was asked for FSDP"),
    ],
)
def test_two_engines_are_an_error_that_names_both(options: list[str], engine: str, said: str, tmp_path: Path) -> None:
    code, output = runs.finish(runs.launch(config_of(tmp_path, engine=engine), 2, options=options))
    lines = [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert code != 0 and len(lines) == 1 and lines[0].startswith(f"error: {said}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--output_dir=elsewhere", "--output-dir", "-output_dir=elsewhere"])
def test_under_slurm_only_run_dir_says_where_the_run_is(option: str, tmp_path: Path) -> None:
    """Of its own accord the job would go on in one folder, and wait for the stop file of another."""
    run_dir = tmp_path / "run"
    settings = {"CONFIG": "configs/quickstart.yaml", "RUN_DIR": str(run_dir), "VENV": str(tmp_path / "none")}
    command = ["bash", "slurm/train.sbatch", "--train.lr=1e-3", option]
    done = subprocess.run(
        command, cwd=runs.ROOT, env=runs.environment() | settings, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 1 and not run_dir.exists()
    assert done.stderr == f"error: {option}: set RUN_DIR in its place\n"
