"""Runs that are killed, stopped and moved: real launches, real signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import runs
from scale_sae import checkpoint

STEPS = 240


def long_config(tmp_path: Path, **changes: Any) -> Path:
    """A float32 run of 240 short steps, LM tp=2 and SAE tp=2, a checkpoint every 50."""
    config = runs.tiny_config(
        tmp_path,
        model={"name": "embedded"},
        saes=[{"d_sae": 512, "k": 8, "dead_feature_window_tokens": 5000}],
        train={"training_tokens": STEPS * 128, "train_batch_size_tokens": 128, "lr": 1e-3},
        checkpoint={"every_steps": 50},
        topology={"lm": {"tp": 2}, "sae": {"tp": 2}},
    )
    config["data"]["dataset"] = str(runs.write_texts(tmp_path / "texts.jsonl", 40))
    config |= changes
    return runs.write_config(tmp_path, config)


def released(out: Path) -> dict[str, bytes]:
    """The tensor files of a release: path → contents."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.safetensors")}


def consolidate(run_dir: Path, out: Path) -> dict[str, bytes]:
    """Makes the release of a run; its tensor files."""
    command = [sys.executable, "-m", "scale_sae.consolidate", str(run_dir), "--out", str(out)]
    subprocess.run(command, env=runs.environment(), check=True, capture_output=True, timeout=120)
    return released(out)


def check_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Checks that two releases of `long_config` are bitwise the same."""
    assert found.keys() == expected.keys() and len(found) == 4  # weights and sparsity at two hookpoints
    assert [name for name in found if found[name] != expected[name]] == []


def check_same_release(run_dir: Path, out: Path, expected: dict[str, bytes]) -> None:
    check_same(consolidate(run_dir, out), expected)


def test_sigkill_then_the_same_command(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    config = long_config(tmp_path)
    process = runs.launch(config, 4)
    runs.wait_for_step(tmp_path / "run", 120, process)
    os.kill(runs.rank_pids(process)[1], signal.SIGKILL)
    code, output = runs.finish(process)
    assert code != 0
    left_at = checkpoint.step_of(checkpoint.complete(tmp_path / "run")[0])
    assert 100 <= left_at < STEPS
    code, output = runs.finish(runs.launch(config, 4))
    assert code == 0, output[-3000:]
    assert f"going on from {tmp_path}/run/checkpoints/step_{left_at:08d}" in output
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(steps) == len(set(steps)) * 2  # two SAEs, no step twice


@pytest.mark.parametrize(
    "how",
    [
        "SIGTERM to an SAE rank",
        pytest.param("SIGTERM to an LM rank", marks=pytest.mark.slow),
        pytest.param("stop file", marks=pytest.mark.slow),
    ],
)
def test_a_stop_checkpoints_and_exits_0(how: str, tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    config = long_config(tmp_path)
    process = runs.launch(config, 4)
    runs.wait_for_step(tmp_path / "run", 60, process)
    pids = runs.rank_pids(process)
    if how == "stop file":
        (tmp_path / "run/stop").touch()
    else:
        os.kill(pids[1 if "SAE" in how else 3], signal.SIGTERM)
    code, output = runs.finish(process)
    # The launcher returns 0 only if every rank does.
    assert code == 0, output[-3000:]
    stopped_at = checkpoint.step_of(checkpoint.complete(tmp_path / "run")[0])
    assert 60 <= stopped_at < STEPS
    assert f"stopped at step {stopped_at} as asked" in output
    if how == "stop file":
        code, output = runs.finish(runs.launch(config, 4))
        assert code == 0, output[-3000:]
        check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_left_out(tmp_path: Path, uninterrupted: dict[str, bytes]) -> None:
    config = long_config(tmp_path)
    process = runs.launch(config, 4)
    runs.wait_for_step(tmp_path / "run", 160, process)
    (tmp_path / "run/stop").touch()
    assert runs.finish(process)[0] == 0
    newest, before = checkpoint.complete(tmp_path / "run")[:2]
    victim = next((newest / "saes").rglob("rows_*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    code, output = runs.finish(runs.launch(config, 4))
    assert code == 0, output[-3000:]
    assert f"checkpoint {newest.name} is damaged and is left out" in output
    assert f"going on from {before}" in output
    check_same_release(tmp_path / "run", tmp_path / "release", uninterrupted)


@pytest.mark.parametrize(
    "name",
    [
        "SAE tp=4",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("colocated tp=1", "colocated groups=2, tp=2")),
    ],
)
def test_resume_on_another_topology(name: str, tmp_path: Path) -> None:
    """A tp=2 checkpoint at step 30 goes on elsewhere; float64, so 1e-9 tells a wrong row from a changed sum."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    whole.mkdir()
    config = runs.tiny_config(whole, topology=runs.TOPOLOGIES["LM tp=2, SAE tp=2"][0], checkpoint={"every_steps": 30})
    runs.forked_run(runs.write_config(whole, config), 4)
    # The same run, cut off after step 30.
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "run/checkpoints/step_00000060")
    topology, world = runs.TOPOLOGIES[name]
    config = {**config, "output_dir": str(moved / "run"), "topology": topology}
    runs.forked_run(runs.write_config(moved, config), world)
    difference = runs.largest_difference(runs.sae_state(moved / "run"), runs.sae_state(whole / "run"))
    print(f"tp=2 to {name}: largest difference {difference:.1e}")
    assert difference <= 1e-9


def test_training_tokens_may_grow(tmp_path: Path) -> None:
    config = runs.tiny_config(tmp_path)
    path = runs.write_config(tmp_path, config)
    runs.forked_run(path, 1)
    longer = config["train"]["training_tokens"] + 10 * 128
    runs.forked_run(path, 1, {"train.training_tokens": longer})
    assert checkpoint.step_of(checkpoint.complete(tmp_path / "run")[0]) == 70
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["train"]["training_tokens"] == longer
