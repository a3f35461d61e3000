"""Whole runs on real processes, for the tests: small configs, ranks by fork or by ``accelerate launch``."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from weakref import WeakKeyDictionary

import datasets  # noqa: F401 (imported before the ranks are forked, so that each need not)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
import yaml
from safetensors.torch import load_file
from torch import Tensor

from harness import run_ranks
from scale_sae import checkpoint, train
from scale_sae.activations.buffer import LaneBuffer
from scale_sae.embedded import standard_library_files

ROOT = Path(__file__).parents[1]
Topology = dict[str, Any]

# name → (topology section, number of ranks)
TOPOLOGIES: dict[str, tuple[Topology, int]] = {
    "colocated tp=1": ({"lm": "colocated", "sae": {"tp": 1}}, 1),
    "LM tp=2, SAE tp=2": ({"lm": {"tp": 2}, "sae": {"tp": 2}}, 4),
    "LM dp=2, SAE tp=1": ({"lm": {"dp": 2}, "sae": {"tp": 1}}, 3),
    "SAE tp=4": ({"lm": {"tp": 1}, "sae": {"tp": 4}}, 5),
    "groups=2": ({"lm": {"tp": 1}, "sae": {"groups": 2}}, 3),
    "colocated tp=2": ({"lm": "colocated", "sae": {"tp": 2}}, 2),
    "colocated groups=2, tp=2": ({"lm": "colocated", "sae": {"groups": 2, "tp": 2}}, 4),
}


@functools.cache  # most tests write one; looking for the files takes most of a second
def texts(files: int) -> str:
    """JSON lines with the first 20,000 characters of each of the first ``files`` modules of the standard library."""
    found = (file.read_text(encoding="utf-8", errors="ignore") for file in standard_library_files()[:files])
    return "".join(json.dumps({"text": text[:20000]}) + "\n" for text in found)


def write_texts(path: Path, files: int = 12) -> Path:
    """A small local dataset, so that the ranks of a test need not read the whole standard library."""
    path.write_text(texts(files))
    return path


def tiny_config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A float64 run of 60 steps with two SAEs at two hookpoints, on a slice of the embedded text."""
    config: dict[str, Any] = {
        "seed": 3,
        "output_dir": str(tmp_path / "run"),
        "model": {"name": "embedded", "dtype": "float64"},
        "data": {
            "dataset": str(write_texts(tmp_path / "texts.jsonl")),
            "context_size": 32,
            "chunk_contexts": 8,
            "eval_fraction": 0.1,
        },
        "hookpoints": ["model.layers.0", "model.layers.1"],
        "saes": [
            {"name": "small", "d_sae": 256, "k": 8, "dtype": "float64"},
            # A short window: most latents die, so AuxK selects among more dead latents than its k.
            {"name": "wide", "d_sae": 512, "k": 4, "dtype": "float64", "dead_feature_window_tokens": 1000},
        ],
        # Plain settings: what the recipes give is tested in test_recipes.
        "recipe": "saelens",
        "train": {"training_tokens": 60 * 128, "train_batch_size_tokens": 128, "lr": 1e-3},
        "buffer": {"tokens": 512, "lanes": 8},
        "checkpoint": {"every_steps": 20},
        "topology": {"lm": "colocated", "sae": {"tp": 1}},
    }
    return config | changes


def write_config(tmp_path: Path, config: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def forked_run(config: Path, world: int, overrides: dict[str, Any] | None = None, record: bool = False) -> list[Any]:
    """Trains on ``world`` forked ranks; the result per rank: what `record` saw, after an exit code of 0."""

    def worker(rank: int, world: int) -> dict[str, list[Tensor]]:
        drawn: dict[str, list[Tensor]] = {}
        if record:
            original = LaneBuffer.remove

            def remove(self: LaneBuffer, step: int) -> None:
                for name, rows in self.peek(step).items():
                    drawn.setdefault(name, []).append(rows)
                original(self, step)

            LaneBuffer.remove = remove  # type: ignore[method-assign]
        code = train.run(str(config), (), overrides or {})
        assert code == 0, f"exit code {code}"
        return drawn

    return run_ranks(world, worker, timeout=180, init=False)


def batches_of(results: list[dict[str, list[Tensor]]], hookpoint: str) -> Tensor:
    """``[steps, batch, width]``: what the ranks that host lanes of ``hookpoint`` drew, in lane order."""
    parts = [torch.stack(drawn[hookpoint]) for drawn in results if hookpoint in drawn]
    return torch.cat(parts, dim=1)


def sae_state(run_dir: Path) -> dict[str, Tensor]:
    """Every tensor of every SAE in a run's newest checkpoint, whole: ``sae folder/tensor name`` → tensor."""
    newest = checkpoint.complete(run_dir)[0]
    state: dict[str, Tensor] = {}
    for replicated in sorted((newest / "saes").rglob(checkpoint.REPLICATED)):
        folder = replicated.parent
        name = folder.relative_to(newest / "saes").as_posix()
        for tensor in checkpoint.row_names(folder):
            state[f"{name}/{tensor}"] = checkpoint.read_rows(folder, tensor, 0, checkpoint.total_rows(folder))
        state |= {f"{name}/{key}": value for key, value in load_file(replicated).items()}
    return state


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest of max|a−b| / max|b| over the tensors; infinite where their names or shapes differ."""
    if a.keys() != b.keys():
        return float("inf")
    worst = 0.0
    for name, value in b.items():
        other = a[name].double()
        scale = float(value.double().abs().max())
        difference = float((other - value.double()).abs().max())
        worst = max(worst, difference / scale if scale else difference)
    return worst


# ---- real launches ---------------------------------------------------------------------------------------------------

# What launches print goes to files: a pipe that nobody reads holds 64 KiB, and a run that prints more then waits.
OUTPUTS: WeakKeyDictionary[subprocess.Popen[str], IO[str]] = WeakKeyDictionary()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}


def launch(
    config: Path, world: int, *arguments: str, options: Sequence[str] = (), within: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Starts ``[within] accelerate launch [options] -m scale_sae.train`` in a process group of its own.

    ``within`` is a command that becomes the one that follows it, as ``env`` does.
    """
    command = [
        *within,
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch/cpu.yaml"),
    ]
    command += ["--num_processes", str(world), *options, "-m", "scale_sae.train", "--config", str(config), *arguments]
    output = tempfile.TemporaryFile("a+", errors="replace")  # noqa: SIM115 (closed by the collector, with the launch)
    process = subprocess.Popen(
        command,
        cwd=config.parent,
        env=environment(),
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    OUTPUTS[process] = output
    return process


def finish(process: subprocess.Popen[str], timeout: float = 180) -> tuple[int, str]:
    """Exit code and output; a launch that hangs is ended with all its ranks, and the test fails."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        for pid in [*rank_pids(process), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(f"the launch did not end within {timeout} s\n{output_of(process)[-3000:]}") from None
    return process.returncode, output_of(process)


def output_of(process: subprocess.Popen[str]) -> str:
    """What a launch has printed."""
    OUTPUTS[process].seek(0)
    return OUTPUTS[process].read()


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """The ranks' process ids, in rank order: children of the launcher, each in a session of its own."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent != process.pid:
                continue
            variables = dict(part.split("=", 1) for part in (entry / "environ").read_text().split("\0") if "=" in part)
        except (ProcessLookupError, FileNotFoundError):
            continue
        if "LOCAL_RANK" in variables:
            found[int(variables["RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def wait_for_step(
    run_dir: Path, step: int, process: subprocess.Popen[str], timeout: float = 120, since: float = 0.0
) -> None:
    """Returns once ``metrics.jsonl`` has reached ``step``, with a file that was written after ``since``.

    Ranks that go on from a checkpoint first drop the steps after it; ``since``, a time of the clock at which those
    before were gone, tells the steps of the new ranks from those of the old.
    """
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        fresh = path.exists() and path.stat().st_mtime > since
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if fresh else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.05)
    code, output = finish(process, 1)
    raise AssertionError(f"the run never reached step {step}; exit code {code}\n{output[-3000:]}")
