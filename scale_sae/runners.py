"""The runners that users of SAELens know: a config in, a trained SAE or a cache of activations out.

``LanguageModelSAETrainingRunner(cfg).run()`` is ``scale_sae.train`` and ``scale_sae.consolidate`` in one call, on one
process or, under ``accelerate launch``, on as many as the config's topology needs. Every process makes the same call.
"""

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist

from scale_sae import cache_activations, checkpoint, consolidate, topology
from scale_sae.errors import UserError
from scale_sae.runner_config import CacheActivationsRunnerConfig, LanguageModelSAERunnerConfig
from scale_sae.saes import SAE
from scale_sae.saes.inference import WEIGHTS_FILE
from scale_sae.session import Session, agree, joined
from scale_sae.tensorfile import file_digest
from scale_sae.train import train_in

__all__ = [
    "CacheActivationsRunner",
    "CacheActivationsRunnerConfig",
    "LanguageModelSAERunnerConfig",
    "LanguageModelSAETrainingRunner",
]

# Says in a run's folder that its SAE was released, and which it was: the next call with this config begins anew.
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

        Where the text ends early, that is the SAE of the rows that there are; a line says how many.

        Returns:
            The whole SAE, on ``device``; of several processes, each has it on the CPU.

        Raises:
            UserError: on every process: the text has no whole batch, the SAE diverged, a folder cannot be written...
            SystemExit: the process was asked to stop. Before the run's end, the same call goes on.
        """
        folder = Path(self.run_config.output_dir)
        with on_device(self.cfg.device), joined() as session:
            done = self._train(session, folder)
            if done:
                # A GPU has room for its share of the SAE, perhaps not for all of it beside the next run's.
                device = self.cfg.device if session.world_size == 1 else "cpu"
                # All have read it before the folder may go.
                sae = agree(lambda: SAE.load_from_disk(self._out(folder), device=device))
            stop = torch.tensor(int(session.stop.signalled))
            dist.all_reduce(stop, dist.ReduceOp.MAX)
        if done and session.is_main:
            self._tidy(folder)
        # Also where the signal came when the training was over: the script must not go on.
        if not done or stop or session.stop.signalled:
            raise SystemExit(0)
        return sae

    def _train(self, session: Session, folder: Path) -> bool:
        """Trains and releases, on every process; False if it was asked to stop before."""
        released = [agree(lambda: self._begin(folder) if session.is_main else False)]
        dist.broadcast_object_list(released, 0)
        if released[0]:
            session.say(f"{folder}: trained and released before this restart")
            return True
        done = train_in(session, self.run_config, sys.argv[0], text_may_end=True)
        if done:
            agree(lambda: self._release(folder) if session.is_main else None)
        return done

    def _out(self, folder: Path) -> Path:
        return folder / "release" if self.cfg.output_path is None else Path(self.cfg.output_path)

    def _begin(self, folder: Path) -> bool:
        """Sets a finished run of this config aside, and gives a new one its id at wandb.

        Returns:
            Whether the launcher has started the script again after a crash, and the SAE was released before it.

        Raises:
            UserError: ``output_path`` cannot be written.
        """
        self._check_out()
        if (folder / DONE).exists():
            restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
            weights = self._out(folder) / WEIGHTS_FILE
            # Another run of the script may have written to the same output_path.
            if restarted and weights.exists() and (folder / DONE).read_text() == json.dumps(file_digest(weights)):
                return True
            number = 1
            while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
                number += 1
            folder.rename(aside)
        if self.cfg.logger.wandb_id is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "wandb_id").write_text(self.cfg.logger.wandb_id)
        return False

    def _check_out(self) -> None:
        if self.cfg.output_path is None:
            return
        out = Path(self.cfg.output_path)
        nearest = next(place for place in (out, *out.parents) if place.exists())
        try:
            with tempfile.TemporaryFile(dir=nearest) as file:
                file.write(b"1")
        except OSError as error:
            raise UserError(
                f"output_path: {out} cannot be written ({error.strerror or error}); choose another folder, or make room"
            ) from None

    def _release(self, folder: Path) -> None:
        """`_write_release`, with what the disk says as a UserError."""
        try:
            self._write_release(folder)
        except OSError as error:
            raise UserError(
                f"output_path: {self._out(folder)} cannot be written ({error.strerror or error}); make room, then make "
                "the same call again: the training is done"
            ) from error

    def _write_release(self, folder: Path) -> None:
        """Writes the newest checkpoint's SAE to the output folder, beside what else is there."""
        out, aside = self._out(folder), folder / ".release"
        with redirect_stdout(io.StringIO()):  # what it says is of the folder aside
            (report,) = consolidate.consolidate(folder, aside)
        out.mkdir(parents=True, exist_ok=True)
        for file in (aside / checkpoint.folder_name(report.sae_id)).iterdir():
            shutil.copyfile(file, out / f".{file.name}")  # the two folders may be on different disks
            (out / f".{file.name}").rename(out / file.name)
        shutil.rmtree(aside)
        (folder / DONE).write_text(json.dumps(file_digest(out / WEIGHTS_FILE)))
        if self.cfg.output_path is not None:
            print(f"{out}: the SAE at {report.sae_id}, reloaded and compared with the trained one")

    def _tidy(self, folder: Path) -> None:
        """Removes checkpoints that nobody asked for."""
        if self.cfg.checkpoint_path is None:
            shutil.rmtree(folder)
            return
        if self.cfg.output_path is None:
            shutil.rmtree(folder / "release")
        found = checkpoint.complete(folder)  # the newest first; none where a restart found all done
        every = self.run_config.checkpoint.keep_every
        unasked = [path for path in found[1:] if every is None or checkpoint.step_of(path) % every]
        for path in unasked if self.cfg.save_final_checkpoint else [*unasked, *found[:1]]:
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
