"""The runners that users of SAELens know: a config in, a trained SAE or a cache of activations out.

``LanguageModelSAETrainingRunner(cfg).run()`` is ``scale_sae.train`` and ``scale_sae.consolidate`` in one call, on one
process or, under ``accelerate launch``, on as many as the config's topology needs. Every process makes the same call.
"""

import io
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from scale_sae import cache_activations, checkpoint, consolidate, topology
from scale_sae.runner_config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from scale_sae.saes import SAE
from scale_sae.session import agree, joined
from scale_sae.train import train_in

__all__ = [
    "CacheActivationsRunner",
    "CacheActivationsRunnerConfig",
    "LanguageModelSAERunnerConfig",
    "LanguageModelSAETrainingRunner",
]

# Says in a run's folder that its SAE was released: the next call with this config begins anew.
DONE = "released"


class LanguageModelSAETrainingRunner:
    """Trains one SAE on a language model.

    An interrupted run (SIGTERM, the file ``stop`` in its folder, a crash) goes on where the same call is made again. A
    finished one is trained anew; the folder of the one before is kept beside it.

    Raises:
        UserError: what is wrong with the config, on every process, before any model is loaded.
    """

    def __init__(self, cfg: LanguageModelSAERunnerConfig):
        self.cfg = cfg
        self.run_config = cfg.to_run_config(topology.world_from_environment()[1])

    def run(self) -> SAE:
        """Trains, writes the SAE to ``output_path`` and returns it, as it was released, on every process.

        Raises:
            UserError: on every process: the text ended early, the SAE has diverged, a folder cannot be written...
            SystemExit: the run was asked to stop before its end; the same call goes on.
        """
        folder = Path(self.run_config.output_dir)
        with on_device(self.cfg.device), joined() as session:
            agree(lambda: self._begin(folder) if session.is_main else None)
            done = train_in(session, self.run_config, sys.argv[0])
            if done:
                agree(lambda: self._release(folder) if session.is_main else None)
                # All have read it before the folder may go.
                sae = agree(lambda: SAE.load_from_disk(self._out(folder), device=self.cfg.device))
        if not done:
            raise SystemExit(0)
        if session.is_main:
            self._tidy(folder)
        return sae

    def _out(self, folder: Path) -> Path:
        return folder / "release" if self.cfg.output_path is None else Path(self.cfg.output_path)

    def _begin(self, folder: Path) -> None:
        """Sets a finished run of this config aside, and gives a new one its id at wandb."""
        if (folder / DONE).exists():
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
        if self.cfg.logger.wandb_id is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "wandb_id").write_text(self.cfg.logger.wandb_id)

    def _release(self, folder: Path) -> None:
        """Writes the newest checkpoint's SAE to the output folder, beside what else is there."""
        out, aside = self._out(folder), folder / ".release"
        with redirect_stdout(io.StringIO()):  # what it says is of the folder aside
            (report,) = consolidate.consolidate(folder, aside)
        out.mkdir(parents=True, exist_ok=True)
        for file in (aside / checkpoint.folder_name(report.sae_id)).iterdir():
            shutil.copyfile(file, out / f".{file.name}")  # the two folders may be on different disks
            (out / f".{file.name}").rename(out / file.name)
        shutil.rmtree(aside)
        (folder / DONE).touch()
        if self.cfg.output_path is not None:
            print(f"{out}: the SAE at {report.sae_id}, reloaded and compared with the trained one")

    def _tidy(self, folder: Path) -> None:
        """Removes checkpoints that nobody asked for."""
        if self.cfg.checkpoint_path is None:
            shutil.rmtree(folder)
            return
        if self.cfg.output_path is None:
            shutil.rmtree(folder / "release")
        kept = checkpoint.complete(folder)  # the newest first
        if self.cfg.save_final_checkpoint:
            kept = kept[1:]
        if self.cfg.n_checkpoints:
            every = self.run_config.checkpoint.every_steps
            kept = [path for path in kept if checkpoint.step_of(path) % every]
        for path in kept:
            shutil.rmtree(path)


class CacheActivationsRunner:
    """Caches the activations at a hook, for runs with ``use_cached_activations=True``.

    The same call goes on where it was interrupted, and adds rows where ``training_tokens`` is larger.

    Raises:
        UserError: what is wrong with the config, on every process, before any model is loaded.
    """

    def __init__(self, cfg: CacheActivationsRunnerConfig):
        self.cfg = cfg
        self.run_config = cfg.to_run_config()

    def run(self) -> Path:
        """Fills the folder ``new_cached_activations_path`` and returns it.

        Raises:
            UserError: on every process: the folder holds another cache, the text ended early, the disk is full...
            SystemExit: the run was asked to stop before its end; the same call goes on.
        """
        assert self.cfg.new_cached_activations_path is not None and self.cfg.device is not None
        folder = Path(self.cfg.new_cached_activations_path)
        with on_device(self.cfg.device):
            if not cache_activations.cache(self.run_config, folder):
                raise SystemExit(0)
        return folder


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """While open, sessions use the CPU where ``device`` is ``cpu``, also beside GPUs."""
    if device != "cpu":
        yield
        return
    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["ACCELERATE_USE_CPU"]
        else:
            os.environ["ACCELERATE_USE_CPU"] = before
