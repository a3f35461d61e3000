"""The scripts in examples/: each trains as one process and as several, and the SAE is the same."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import runs
from harness import run_ranks
from scale_sae import SAE

# example → the option that says how many rows it trains on
EXAMPLES = {
    "custom_runner": "training_samples",
    "gpt2_classifier": "training_tokens",
    "vision_transformer": "training_tokens",
}
STEPS = 12
# float64: only the order of sums differs, and few steps of Adam amplify it little.
SAME = 1e-9


def load(name: str) -> ModuleType:
    """The script as a module, without its command line."""
    spec = importlib.util.spec_from_file_location(name, runs.ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for a class's module
    spec.loader.exec_module(module)
    return module


def options(name: str, folder: Path) -> dict[str, Any]:
    """Few steps, in float64."""
    return {EXAMPLES[name]: STEPS * 512, "dtype": "float64", "output_path": str(folder), "device": "cpu"}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return dict(SAE.load_from_disk(folder).state_dict())


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_process_and_two_train_the_same_sae(tmp_path: Path, name: str) -> None:
    script = load(name)

    def worker(rank: int, world: int) -> None:
        script.main(**options(name, tmp_path / str(world)))

    for world in (1, 2):
        run_ranks(world, worker, init=False)
    assert runs.largest_difference(saved(tmp_path / "2"), saved(tmp_path / "1")) < SAME
    loaded = pytest.importorskip("sae_lens").SAE.load_from_disk(str(tmp_path / "2"))
    assert loaded.cfg.normalize_activations == "none" and loaded.cfg.metadata.hook_name


def launched(name: str, folder: Path, world: int) -> None:
    """Runs the script as its first lines say."""
    command = [sys.executable]
    if world > 1:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(runs.ROOT / "launch/cpu.yaml")]
        command += ["--num_processes", str(world)]
    command += [f"examples/{name}.py", *(f"--{key}={value}" for key, value in options(name, folder).items())]
    environment = {**runs.environment(), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=runs.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training: 100%" in done.stderr


def test_a_launch(tmp_path: Path) -> None:
    launched("custom_runner", tmp_path / "launched", 2)
    script = load("custom_runner")
    run_ranks(1, lambda rank, world: script.main(**options("custom_runner", tmp_path / "here")), init=False)
    assert runs.largest_difference(saved(tmp_path / "launched"), saved(tmp_path / "here")) < SAME


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_launch(tmp_path: Path, name: str, world: int) -> None:
    assert "RANK" not in os.environ
    launched(name, tmp_path, world)
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path).values())
