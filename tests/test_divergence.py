"""An SAE that diverges is frozen and reported; the others go on, and only they are released."""

import json
from pathlib import Path

import pytest

import runs
from scale_sae import checkpoint
from scale_sae.consolidate import consolidate
from scale_sae.errors import UserError


def test_one_diverges_the_others_go_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    healthy = {"name": "healthy", "d_sae": 256, "k": 8}
    config = runs.tiny_config(
        tmp_path,
        # The first step makes the weights so large that pre-activations overflow float32.
        saes=[healthy, {"name": "diverging", "d_sae": 256, "k": 8, "lr": 1e38, "hookpoints": ["model.layers.1"]}],
        model={"name": "embedded"},
        topology=runs.TOPOLOGIES["colocated groups=2, tp=2"][0],
    )
    runs.forked_run(runs.write_config(tmp_path, config), 4)
    assert capfd.readouterr().err.count("model.layers.1/diverging has diverged") == 1
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    last = [record["sae_id"] for record in records if record["step"] == 60]
    assert last == ["model.layers.0/healthy", "model.layers.1/healthy"]
    # The healthy ones are those of a run without the other.
    alone = tmp_path / "alone"
    alone.mkdir()
    config = {**config, "saes": [healthy], "output_dir": str(alone / "run")}
    runs.forked_run(runs.write_config(alone, config), 4)
    state = {name: value for name, value in runs.sae_state(tmp_path / "run").items() if "/healthy/" in name}
    assert runs.largest_difference(state, runs.sae_state(alone / "run")) == 0
    reports = consolidate(tmp_path / "run", tmp_path / "release", None, None)
    assert [report.sae_id for report in reports] == ["model.layers.0/healthy", "model.layers.1/healthy"]
    assert not (tmp_path / "release/model.layers.1/diverging").exists()
    assert "model.layers.1/diverging: has diverged" in capfd.readouterr().err


def test_an_sae_that_diverges_just_before_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint is written all the same; no step has met the SAE's values, the release finds them."""
    bad = {
        "name": "bad",
        "architecture": "batchtopk",
        "d_sae": 256,
        "k": 8,
        "lr": 1e38,
        "hookpoints": ["model.layers.1"],
    }
    config = runs.tiny_config(
        tmp_path,
        saes=[{"name": "healthy", "d_sae": 256, "k": 8, "hookpoints": ["model.layers.0"]}, bad],
        model={"name": "embedded"},
        train={"training_tokens": 3 * 128, "train_batch_size_tokens": 128},
        checkpoint={"every_steps": 1, "keep": 3},
        topology={"lm": "colocated", "sae": {"tp": 2}},
    )
    runs.forked_run(runs.write_config(tmp_path, config), 2)
    assert [checkpoint.step_of(folder) for folder in checkpoint.complete(tmp_path / "run")] == [3, 2, 1]
    reports = consolidate(tmp_path / "run", tmp_path / "release", step=1)
    assert [report.sae_id for report in reports] == ["model.layers.0/healthy"]
    assert not (tmp_path / "release/model.layers.1").exists()
    assert "model.layers.1/bad: has diverged" in capsys.readouterr().err


def test_an_sae_without_a_finite_step_is_not_released(tmp_path: Path) -> None:
    """A ReLU SAE overflows without raising NonFiniteError, and ends before enough skipped updates freeze it."""
    bad = {"name": "bad", "architecture": "standard", "d_sae": 256, "lr": 1e38}
    config = runs.tiny_config(
        tmp_path,
        saes=[{"name": "healthy", "d_sae": 256, "k": 8}, bad],
        hookpoints=["model.layers.0"],
        model={"name": "embedded"},
        train={"training_tokens": 10 * 128, "train_batch_size_tokens": 128},
    )
    runs.forked_run(runs.write_config(tmp_path, config), 1)
    reports = consolidate(tmp_path / "run", tmp_path / "release")
    assert [report.sae_id for report in reports] == ["model.layers.0/healthy"]


def test_a_named_checkpoint_starts_a_run_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = tmp_path / "first"
    first.mkdir()
    config = runs.tiny_config(first, checkpoint={"every_steps": 20, "keep": 5})
    path = runs.write_config(first, config)
    runs.forked_run(path, 1)
    start = first / "run/checkpoints/step_00000020"
    branch = tmp_path / "branch"
    changes = {"output_dir": str(branch), "resume": str(start)}
    runs.forked_run(path, 1, changes)
    assert runs.largest_difference(runs.sae_state(branch), runs.sae_state(first / "run")) == 0
    # The same command again finds the branch's own checkpoints.
    capfd.readouterr()
    runs.forked_run(path, 1, changes)
    assert f"going on from {branch}/checkpoints/step_00000060" in capfd.readouterr().err
    assert checkpoint.step_of(checkpoint.complete(branch)[-1]) == 40


def test_a_checkpoint_of_the_run_itself_is_refused(tmp_path: Path) -> None:
    from scale_sae import config, rundir

    tree = runs.tiny_config(tmp_path, resume=str(tmp_path / "run/checkpoints/step_00000020"))
    with pytest.raises(UserError, match=r"resume: .*step_00000020 lies in output_dir"):
        rundir.check(config.from_dict(tree))


def test_a_named_checkpoint_must_be_there(tmp_path: Path) -> None:
    from scale_sae import config, rundir

    tree = runs.tiny_config(tmp_path, resume=str(tmp_path / "no/step_00000020"))
    with pytest.raises(UserError, match=r"resume: .*no/step_00000020 is no intact checkpoint"):
        rundir.find_checkpoint(config.from_dict(tree), (0, 1), lambda problems: problems, print)
