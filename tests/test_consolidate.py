"""The command that releases: the checkpoint it takes, what it replaces, what it leaves when it fails, wrong inputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fire
import pytest

from made_up_run import save_run
from scale_sae import checkpoint, export
from scale_sae.consolidate import consolidate, is_release, main
from scale_sae.errors import UserError
from scale_sae.saes.inference import CFG_FILE


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "run", step=10)
    newest = save_run(tmp_path / "run", step=20)
    (newest / "meta.json").write_text("{}")
    consolidate(tmp_path / "run", tmp_path / "out")
    said = capsys.readouterr()
    assert "step_00000020 is damaged and is left out" in said.err and "of step 10 " in said.out
    with pytest.raises(UserError, match="no intact checkpoint of step 20"):
        consolidate(tmp_path / "run", tmp_path / "out", step=20)
    (checkpoint.complete(tmp_path / "run")[1] / "meta.json").unlink()
    with pytest.raises(UserError, match="no intact checkpoint; restore one"):
        consolidate(tmp_path / "run", tmp_path / "out")


def test_a_given_step_is_released(tmp_path: Path) -> None:
    for step in (10, 20):
        save_run(tmp_path / "run", step=step)
    consolidate(tmp_path / "run", tmp_path / "out", step=10)
    cfg = json.loads((tmp_path / "out" / "model.layers.1" / CFG_FILE).read_text())
    assert cfg["metadata"]["training_steps"] == 10
    with pytest.raises(UserError, match="no complete checkpoint of that step; it has 20, 10"):
        consolidate(tmp_path / "run", tmp_path / "out", step=30)


def test_only_a_release_is_replaced(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    out = tmp_path / "out"
    out.mkdir()
    consolidate(tmp_path / "run", out)  # an empty folder is no loss
    (out / "model.layers.1" / "eval.json").write_text("{}")
    assert is_release(out)
    consolidate(tmp_path / "run", out, dtype="bfloat16")
    assert json.loads((out / "model.layers.1" / CFG_FILE).read_text())["dtype"] == "bfloat16"
    assert not (out / "model.layers.1" / "eval.json").exists()  # it was about the weights before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]

    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a release of scale_sae"):
        consolidate(tmp_path / "run", out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match="is not a release of scale_sae"):
        consolidate(tmp_path / "run", tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a release of scale_sae"):
        consolidate(tmp_path / "run", tmp_path / "file")


def test_a_failed_release_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "run", hookpoints=["model.layers.0", "model.layers.1"])
    consolidate(tmp_path / "run", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    write_sparsity = export.write_sparsity

    def full_disk(sae: export.StoredSAE, path: Path) -> None:
        if sae.folder.name == "model.layers.1":
            raise OSError(28, os.strerror(28), str(path))
        write_sparsity(sae, path)

    monkeypatch.setattr(export, "write_sparsity", full_disk)
    with pytest.raises(OSError, match="No space left"):
        consolidate(tmp_path / "run", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


WRONG_INPUTS: dict[str, tuple[list[str], str]] = {
    "no run": (["--out", "{tmp}/out"], "RUN_DIR is missing"),
    "no checkpoint": (["{tmp}/nothing", "--out", "{tmp}/out"], "{tmp}/nothing: holds no complete checkpoint"),
    "no out": (["{tmp}/run"], "--out is missing"),
    "unknown flag": (["{tmp}/run", "--out", "{tmp}/out", "--stpe", "3"], "--stpe 3: no such option (did you mean step"),
    "extra": (["{tmp}/run", "{tmp}/out"], "{tmp}/out: the run's output_dir is the only argument"),
    "step": (["{tmp}/run", "--out", "{tmp}/out", "--step", "last"], "--step last: must be the number of a step"),
    "bare step": (["{tmp}/run", "--out", "{tmp}/out", "--step"], "--step True: must be the number of a step"),
    "format": (
        ["{tmp}/run", "--out", "{tmp}/out", "--format", "sparsfy"],
        "--format sparsfy: must be one of saelens, sparsify, dictionary_learning (did you mean sparsify?)",
    ),
    "dtype": (["{tmp}/run", "--out", "{tmp}/out", "--dtype", "bf16"], "--dtype bf16: must be one of float32,"),
}


def command_line(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "scale_sae.consolidate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_a_wrong_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    save_run(tmp_path / "run")
    arguments, message = WRONG_INPUTS[case]
    with pytest.raises(SystemExit) as stopped:
        fire.Fire(main, command=[argument.format(tmp=tmp_path) for argument in arguments])
    line = str(stopped.value)  # Python prints it to stderr and exits with 1
    assert line.startswith(f"error: {message.format(tmp=tmp_path)}") and "\n" not in line
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    done = command_line(str(tmp_path / "run"), "--out", str(tmp_path / "a b" / "out"))
    assert done.returncode == 0
    assert all(line.startswith("Consolidating") for line in done.stderr.splitlines())  # progress, and nothing else
    assert done.stdout.splitlines()[-1] == f"released 1 SAEs in {tmp_path / 'a b' / 'out'}"
    failed = command_line(str(tmp_path / "run"), "--out", str(tmp_path / "run"))
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith("error: --out") and failed.stderr.count("\n") == 1


def test_help_prints_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    fire.Fire(main, command=["--help"])
    shown = capsys.readouterr().out
    assert all(
        option in shown for option in ("RUN_DIR --out DIR [--step N] [--dtype D] [--format F]", "step: ", "dtype: ")
    )
