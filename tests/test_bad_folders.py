"""Started in a folder that holds a run: nothing in it is overwritten, and damaged checkpoints are left out."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from refusals import check_refused, contents, end_of, short_config
from scale_sae import checkpoint, config, jobs, rundir


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The config of a finished run, started with a wrong dataset at first; no test leaves a change in its folder."""
    folder = tmp_path_factory.mktemp("trained")
    path = runs.write_config(folder, short_config(folder))
    jobs.resolve(config.load(path))  # forked ranks have from the start what each would import for it
    assert end_of(path, 3, {"data.column": "body"}).codes == [1, 1, 1]
    ended = end_of(path, 3)
    assert ended.codes == [0, 0, 0] and ended.lines == [], ended.printed
    before = contents(folder)
    assert {"run/checkpoints/step_00000004/complete.json", "run/checkpoints/step_00000008/complete.json"} <= set(before)
    yield path
    assert {name: data for name, data in contents(folder).items() if not name.startswith("printed_")} == {
        name: data for name, data in before.items() if not name.startswith("printed_")
    }


def moved(path: Path, folder: Path) -> Path:
    """A copy of a run and its config in ``folder``."""
    shutil.copytree(path.parent / "run", folder / "run")
    tree = short_config(path.parent, output_dir=str(folder / "run"))
    return runs.write_config(folder, tree)


OCCUPIED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another config": ({"train.lr": 2e-3}, ["holds a run with another config", "train.lr: 0.001 != 0.002"]),
    "resume: never": ({"resume": "never"}, ["output_dir", "already holds a run"]),
    "resume from nothing": ({"resume": "./no/step_00000004"}, ["resume", "no/step_00000004", "already holds a run"]),
}


@pytest.mark.parametrize("name", OCCUPIED)
def test_refused_in_the_folder_of_a_run(name: str, trained: Path) -> None:
    overrides, words = OCCUPIED[name]
    (trained.parent / "run/stop").touch()
    before = contents(trained.parent / "run")
    check_refused(end_of(trained, 3, overrides), words)
    assert contents(trained.parent / "run") == before
    (trained.parent / "run/stop").unlink()


def test_refused_while_another_run_is_alive(trained: Path) -> None:
    before = contents(trained.parent / "run")
    with rundir.lock(trained.parent / "run"):
        check_refused(end_of(trained, 3), ["output_dir", str(trained.parent / "run"), "in use by another run"])
    assert contents(trained.parent / "run") == before


def test_refused_checkpoints_of_an_unknown_config(trained: Path, tmp_path: Path) -> None:
    path = moved(trained, tmp_path)
    (tmp_path / "run/config.yaml").unlink()
    before = contents(tmp_path / "run")
    check_refused(end_of(path, 3), ["output_dir", "checkpoints but no config.yaml"])
    assert contents(tmp_path / "run") == before


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("victim", ["saes/*/rows_0000000032_*.safetensors", "complete.json"])
def test_a_truncated_checkpoint_is_left_out(victim: str, trained: Path, tmp_path: Path) -> None:
    path = moved(trained, tmp_path)
    newest, before = checkpoint.complete(tmp_path / "run")
    truncate(next(newest.glob(victim)))
    ended = end_of(path, 3)
    assert ended.codes == [0, 0, 0], ended.printed
    damaged, going_on = ended.lines
    assert damaged.startswith("checkpoint step_00000008 is damaged and is left out: ")
    assert going_on == f"going on from {before}"
    state, expected = runs.sae_state(tmp_path / "run"), runs.sae_state(trained.parent / "run")
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_refused_if_every_checkpoint_is_damaged(trained: Path, tmp_path: Path) -> None:
    path = moved(trained, tmp_path)
    for folder in checkpoint.complete(tmp_path / "run"):
        truncate(folder / "meta.json")
    before = contents(tmp_path / "run")
    ended = end_of(path, 3)
    assert ended.codes == [1, 1, 1]
    first, second, error = ended.lines
    assert "step_00000008 is damaged" in first and "step_00000004 is damaged" in second
    assert error.startswith("error: resume: no checkpoint in ")
    assert contents(tmp_path / "run") == before
