"""The folder of a run: who may write to it, whether it belongs to this config, and which checkpoint to go on from."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

from scale_sae import checkpoint, recipes
from scale_sae.config import RunConfig, differences, from_saved, identity, to_dict
from scale_sae.errors import UserError

CONFIG = "config.yaml"
STOP = "stop"


def lock(run_dir: Path, key: str = "output_dir") -> IO[str]:
    """Takes the folder for this process; the lock ends with it. ``UserError`` (of ``key``) if another run holds it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = (run_dir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{key}: {run_dir} cannot be written ({error.strerror}); choose another folder") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{key}: {run_dir} is in use by another run; wait for it or choose another folder") from None
    except OSError as error:
        raise UserError(
            f"{key}: {run_dir} cannot be locked ({error.strerror}); mount it with file locks (Lustre: -o flock)"
        ) from None
    return handle


def check(config: RunConfig) -> None:
    """Checks that ``output_dir`` is new or holds this very run.

    One rank calls it, holding the lock. ``UserError`` names the first keys that differ from the run in the folder.
    """
    run_dir = Path(config.output_dir)
    path = run_dir / CONFIG
    if config.resume not in ("auto", "never") and Path(config.resume).resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            f"resume: {config.resume} lies in output_dir; set resume: auto to go on from its newest checkpoint, or "
            "choose another output_dir to branch off an older one"
        )
    if path.exists():
        if config.resume == "never":
            raise UserError(
                f"output_dir: {run_dir} already holds a run; set resume: auto to go on, or choose another folder"
            )
        saved = from_saved(yaml.safe_load(path.read_text()))
        if config.resume not in ("auto", saved.resume):
            raise UserError(
                f"resume: {config.resume}, but {run_dir} already holds a run that did not start from it; set resume: "
                "auto to go on, or choose another output_dir"
            )
        check_same_run(config, to_dict(saved), checkpoint.complete(run_dir), str(run_dir))
    elif checkpoint.complete(run_dir):
        raise UserError(f"output_dir: {run_dir} holds checkpoints but no {CONFIG}; choose another folder")


def record(config: RunConfig) -> None:
    """Writes the resolved config into ``output_dir``. One rank calls it."""
    run_dir = Path(config.output_dir)
    aside = run_dir / f".{CONFIG}"
    aside.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    aside.rename(run_dir / CONFIG)


def check_same_run(config: RunConfig, saved: dict[str, Any], checkpoints: list[Path], where: str) -> None:
    """``UserError`` unless ``config`` is the run ``saved`` (a plain resolved config) in all that decides its result.

    ``training_tokens`` may grow as long as no learning rate depends on where the run ends. Rows then come in another
    order than in a run of that length from the start where the old one had begun to use up its buffer.
    """
    old = from_saved(saved)
    found = differences(identity(old), identity(config))
    grows = config.train.training_tokens > old.train.training_tokens
    if grows and all(line.startswith("train.training_tokens") for line in found):
        done = checkpoint.step_of(checkpoints[0]) if checkpoints else 0
        steps = old.train.training_tokens // old.train.train_batch_size_tokens
        settings = [old.train_of(entry) for entry in old.saes]
        if all(t.lr_scheduler_name == "constant" and done <= steps - t.lr_decay_steps for t in settings):
            return
        raise UserError(
            "train.training_tokens: cannot grow any more: the schedule of the saved run already heads for its end; "
            "choose another output_dir"
        )
    if found:
        others = [line for line in found if not line.startswith("train.training_tokens")]
        if grows and all(_is_filled(line) for line in others):
            raise UserError(
                f"train.training_tokens: {where} holds a run for whose length its recipe gave other values "
                f"({others[0]}); to train on with those, give --config the {CONFIG} of the folder"
            )
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        raise UserError(
            f"output_dir: {where} holds a run with another config ({'; '.join(found[:2])}{more}); "
            "choose another output_dir or restore the config"
        )


def _is_filled(difference: str) -> bool:
    """Whether a line of ``differences`` is of a training key that a recipe may have put into an entry."""
    key = difference.partition(": ")[0]
    return key.startswith("saes.") and key.rpartition(".")[2] in recipes.TRAIN_KEYS


def check_shared(run_dir: Path, nonce: str, key: str = "output_dir") -> None:
    """``UserError`` if this rank does not see the file that rank 0 made in ``run_dir``."""
    # Network file systems cache the contents of folders for a few seconds.
    for _ in range(20):
        if nonce in os.listdir(run_dir) if run_dir.exists() else False:
            return
        time.sleep(0.5)
    raise UserError(f"{key}: {run_dir} is not the same folder on every node; put it on a shared file system")


def find_checkpoint(
    config: RunConfig, share: tuple[int, int], agree: Callable[[list[str]], list[str]], say: Callable[[str], None]
) -> Path | None:
    """The newest intact checkpoint to go on from, the same on all ranks; None for a new run.

    A checkpoint that ``resume`` names starts a run; once the run has checkpoints of its own, it goes on from those.

    Args:
        share: (rank, world size): every rank checks its share of the files.
        agree: joins the ranks' lists of problems, so that all take the same decision.
        say: prints a line on the main process.

    Raises:
        UserError: ``resume`` names no intact checkpoint, or none of the run's checkpoints is intact.
    """
    if config.resume == "never":
        return None
    run_dir = Path(config.output_dir)
    candidates = checkpoint.complete(run_dir)
    if config.resume != "auto" and not candidates:
        folder = Path(config.resume)
        problems = agree(checkpoint.verify(folder, share))
        if problems:
            raise UserError(f"resume: {folder} is no intact checkpoint: {problems[0]}")
        check_same_run(config, checkpoint.read_meta(folder)["config"], [folder], str(folder))
        return folder
    for folder in candidates:
        problems = agree(checkpoint.verify(folder, share))
        if not problems:
            return folder
        say(f"checkpoint {folder.name} is damaged and is left out: {problems[0]}")
    if candidates:
        raise UserError(f"resume: no checkpoint in {run_dir} is intact; restore one, or choose another output_dir")
    return None


def set_aside_newer(run_dir: Path, chosen: Path) -> None:
    """Renames the damaged checkpoints newer than ``chosen``, so that they no longer count among the ones to keep."""
    for folder in checkpoint.complete(run_dir):
        if checkpoint.step_of(folder) > checkpoint.step_of(chosen):
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
