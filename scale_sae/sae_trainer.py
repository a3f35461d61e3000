"""Trains one SAE on any rows that a script yields: SAELens's `SAETrainer`, with the step of this package's runs.

Alone, or under ``accelerate launch`` with the latents shared over all processes: see ``launched_shard``.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae import checkpoint, topology
from scale_sae.activation_scaler import ActivationScaler
from scale_sae.collectives import NonFiniteError
from scale_sae.config_parsing import differences
from scale_sae.data_provider import Batches, DataProvider
from scale_sae.errors import UserError
from scale_sae.job_trainer import JobTrainer, ends_window
from scale_sae.jobs import JobSpec
from scale_sae.launched import repeat_sums
from scale_sae.metrics import to_floats
from scale_sae.optim import learning_rate
from scale_sae.progress import progress_bar
from scale_sae.sae_trainer_config import LoggingConfig, SAETrainerConfig
from scale_sae.saes.base import TrainingSAE
from scale_sae.saes.inference import CFG_FILE, WEIGHTS_FILE
from scale_sae.saes.saving import save_release
from scale_sae.tensorfile import save
from scale_sae.trainer import SKIP_LIMIT, too_many_non_finite
from scale_sae.training_log import TrainingLog, flat

__all__ = ["DataProvider", "Evaluator", "LoggingConfig", "SAETrainer", "SAETrainerConfig", "SaveCheckpointFn"]

T = TypeVar("T", bound=TrainingSAE)
R = TypeVar("R")

# (sae, data_provider, activation_scaler) -> metrics by name, which may be nested.
Evaluator = Callable[[T, DataProvider, ActivationScaler], dict[str, Any]]

STATE = "state"  # the folder of a checkpoint from which the training goes on
SPARSITY = "sparsity.safetensors"


class SaveCheckpointFn(Protocol):
    """What a script does beside each checkpoint, on every rank."""

    def __call__(self, checkpoint_path: Path | None) -> None: ...


class SAETrainer(Generic[T]):
    """The training of one SAE on this rank; where ranks share its latents, all make the same calls.

    Attributes:
        sae: what trains, on ``cfg.device`` from here on.
        n_training_steps, n_training_samples: what is done.
        activation_scaler: multiplies the inputs; its factor is found by ``fit`` where the SAE's config asks for one.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: T,
        data_provider: DataProvider | None,
        evaluator: Evaluator[T] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
    ):
        """Nothing is read or written yet.

        Args:
            cfg: how to train.
            sae: with its first weights, as ``TrainingSAE.from_dict`` makes it; one of all zeros gets those of seed 0.
            data_provider: yields rows ``[n, d_in]`` of any floating-point type. Only the first rank's is read; the
                others may give None.
            evaluator: called on all ranks every ``wandb_log_frequency * eval_every_n_wandb_logs`` steps, without
                gradients. The batches that it draws are trained on afterwards, in their order.
            save_checkpoint_fn: called on all ranks after each checkpoint with its folder.

        Raises:
            UserError: an SAE or a provider that cannot be used.
        """
        _check_sae(sae)
        _check_launch(sae, cfg)
        repeat_sums()
        self.cfg = cfg
        self.sae = sae.to(cfg.device)
        self.evaluator = evaluator
        self.save_checkpoint_fn = save_checkpoint_fn
        self.shard = sae.shard
        if not self.shard.all_reduce(sae.W_dec.any().to(torch.uint8), "max"):
            sae.initialize(0, "")
        self.batches = Batches(data_provider, sae.cfg.d_in, cfg.train_batch_size_samples, self.shard, sae.device)
        self.activation_scaler = ActivationScaler()
        self.n_training_steps = self.n_training_samples = 0
        self.n_non_finite = 0
        settings = cfg.for_command
        spec = JobSpec("sae", "sae", "sae", 0, sae.cfg.architecture(), sae.cfg, settings, None)
        self.job = JobTrainer(spec, sae, cfg.total_training_steps)
        self.finished = False
        self.clock = (time.monotonic(), 0)
        self.log: TrainingLog | None = None  # of the first rank, while it trains

    @property
    def n_samples_drawn(self) -> int:
        """Rows that were taken from the provider: those trained on and, before them, those of the scaling factor."""
        return self.batches.n_taken

    @property
    def leads(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.shard.rank == 0

    def fit(self) -> T:
        """Trains until ``total_training_samples`` rows are trained on, or the provider ends.

        Returns:
            The SAE, for inputs as they are: a scaling factor is folded into its weights.

        Raises:
            UserError: the provider yields nothing or what cannot be trained on; the SAE diverges; the logs or a
                checkpoint cannot be written. On all ranks.
        """
        if self.finished:
            return self.sae
        self._start_from_rows()
        self.clock = (time.monotonic(), self.n_training_steps)
        log = self._agree(
            lambda: TrainingLog(self.cfg, self.n_training_steps, asdict(self.sae.cfg)) if self.leads else None
        )
        with log or nullcontext():
            self.log = log
            try:
                self._train()
                self._finish()
            finally:
                self.log = None
        return self.sae

    def _train(self) -> None:
        """All steps, with what comes between them."""
        thresholds = self._checkpoint_thresholds()
        while self.n_training_samples < self.cfg.total_training_samples:
            batch = next(self.batches, None)
            if batch is None:
                self._say_end()
                return
            self._step(batch)
            self._evaluate_if_due()
            if thresholds and self.n_training_samples > thresholds[0]:
                thresholds.pop(0)
                self.save_checkpoint(str(self.n_training_samples))

    # ---- the step -------------------------------------------------------------------------------------------------

    def _start_from_rows(self) -> None:
        """Sets the factor of the inputs, and b_dec at the mean, from batches that are not trained on.

        SAELens's way to find the factor. A b_dec that is not zero is one that a script has set, and stays.
        """
        finds_scale = self.job.scales_inputs and self.activation_scaler.scaling_factor is None
        sets_b_dec = self.job.starts_at_mean and not self.n_training_steps and not self.sae.b_dec.any()
        if not finds_scale and not sets_b_dec:
            return
        wanted = self.cfg.n_batches_for_norm_estimate
        found = self.activation_scaler if finds_scale else ActivationScaler()
        bar = progress_bar(wanted, "first rows", "batch", unit_scale=False) if self.leads else None
        total = torch.zeros(self.sae.cfg.d_in + 1, dtype=torch.float64, device=self.sae.device)

        def watched() -> Iterator[Tensor]:
            for batch in islice(self.batches, wanted):
                if sets_b_dec:
                    rows = self.sae.row_norm.normalize(batch[batch.isfinite().all(dim=1)].double())
                    total.add_(torch.nn.functional.pad(rows, (0, 1), value=1.0).sum(0))
                yield batch
                if bar is not None:
                    bar.update()

        try:
            found.estimate_scaling_factor(self.sae.cfg.d_in, watched(), wanted)
        finally:
            if bar is not None:
                bar.close()
        if finds_scale:
            assert found.scaling_factor is not None
            self.job.set_scales(found.scaling_factor, found.scaling_factor)
        if sets_b_dec:
            self.job.set_b_dec(total[:-1] / total[-1])

    def _step(self, batch: Tensor) -> None:
        """Trains on ``batch [B, d_in]``, less the rows that are not finite."""
        step, train = self.n_training_steps, self.job.spec.train
        frequency = self.cfg.logger.wandb_log_frequency
        is_logging_step = (
            step == 0 or (step + 1) % frequency == 0 or ends_window(train, step, self.cfg.total_training_steps)
        )
        finite = batch.isfinite().all(dim=1)
        n_rows = int(finite.sum())
        x = batch if n_rows == len(batch) else batch[finite]
        try:
            metrics = self.job.step(x, x, n_rows, step, is_logging_step)
        except NonFiniteError:
            raise self._diverged(step) from None
        self.n_training_steps += 1
        self.n_training_samples += len(batch)
        self.n_non_finite += len(batch) - n_rows
        if self.log is not None:
            self.log.advance()
        if is_logging_step:
            self._check_non_finite()
            self._write(to_floats(metrics))

    def _write(self, values: dict[str, Any]) -> None:
        """Logs the metrics of a step; UserError if they say that the SAE has diverged."""
        steps, samples = self.n_training_steps, self.n_training_samples
        now = time.monotonic()
        rate = (steps - self.clock[1]) * self.batches.batch / max(now - self.clock[0], 1e-9)
        self.clock = (now, steps)
        about = {
            "details/current_learning_rate": learning_rate(
                steps - 1, self.cfg.total_training_steps, self.job.spec.train
            ),
            "details/n_training_samples": samples,
            "stream/non_finite_rows": self.n_non_finite,
            "perf/tokens_per_second": rate,
        }
        self._log({**values, **about})
        if values.get("details/skipped_updates", 0) > SKIP_LIMIT:
            raise self._diverged(steps)

    def _log(self, values: dict[str, Any]) -> None:
        """Logs what was measured after the last step. UserError, on all ranks, if it cannot be written."""
        log, values = self.log, {"tokens": self.n_training_samples, **values}
        self._agree(lambda: None if log is None else log.write(self.n_training_steps, values))

    def _diverged(self, step: int) -> UserError:
        return UserError(
            f"lr: the SAE has diverged by step {step} (non-finite values) with {self.cfg.lr}; lower it, or raise "
            "lr_warm_up_steps"
        )

    def _check_non_finite(self) -> None:
        """UserError if too many rows were left out so far: by the command's limit, or all."""
        bad, rows = self.n_non_finite, self.n_training_samples
        if too_many_non_finite(bad, rows) or bad == rows:
            raise UserError(
                f"data_provider: {bad} of {rows} rows are NaN or infinite by step {self.n_training_steps}; "
                "yield finite rows (a model in float16 may overflow: try bfloat16)"
            )

    def _say_end(self) -> None:
        if not self.n_training_steps:
            raise UserError(
                f"data_provider: yielded {self.batches.rows_left} rows, less than a batch; "
                f"train_batch_size_samples is {self.batches.batch}"
            )
        if self.log is not None:
            self.log.say(
                f"note: data_provider ended after {self.n_training_samples} of {self.cfg.total_training_samples} rows "
                f"in whole batches ({self.batches.rows_left} were left over); the SAE is trained on these"
            )

    def _evaluate_if_due(self) -> None:
        logger = self.cfg.logger
        every = logger.wandb_log_frequency * logger.eval_every_n_wandb_logs
        if self.evaluator is None or self.n_training_steps % every:
            return
        self.sae.eval()
        try:
            with torch.no_grad():
                found = self.evaluator(self.sae, self.batches.ahead(), self.activation_scaler)
        except StopIteration:
            if self.log is not None:
                self.log.say(
                    f"note: no evaluation at step {self.n_training_steps}: data_provider has too few batches left"
                )
            return
        finally:
            self.sae.train()
        self._log(flat(found))

    def _finish(self) -> None:
        """Makes the SAE one for inputs as they are."""
        self._check_non_finite()
        self.sae.metadata |= self._statistics()
        if self.cfg.save_final_checkpoint:
            self.save_checkpoint(f"final_{self.n_training_samples}")
        if self.activation_scaler.scaling_factor is not None:
            with self.job.engine.whole(changes=True):
                self.sae.fold_activation_norm_scaling_factor(self.activation_scaler.scaling_factor)
            self.sae.cfg = replace(self.sae.cfg, normalize_activations="none")
            self.activation_scaler.scaling_factor = None
        self.sae.row_gradients = None  # from here on its gradients are those of any module
        self.finished = True

    # ---- what is known of the latents -----------------------------------------------------------------------------

    @property
    def feature_sparsity(self) -> Tensor:
        """float64 ``[d_sae]``: the share of rows, in the present sampling window, on which each latent fired.

        All ranks call it.
        """
        return self.shard.all_gather(self.job.fired_count).flatten().double() / self.job.window_tokens.clamp(min=1)

    @property
    def log_feature_sparsity(self) -> Tensor:
        """float32 ``[d_sae]`` on the CPU: log10 of ``feature_sparsity`` plus 1e-10, as SAELens stores it.

        All ranks call it.
        """
        return torch.log10(self.feature_sparsity + 1e-10).float().cpu()

    @property
    def dead_neurons(self) -> Tensor:
        """bool ``[d_sae]``: the latents that have not fired for ``dead_feature_window`` steps. All ranks call it."""
        since = self.shard.all_gather(self.job.tokens_since_fired).flatten()
        return since > self.job.spec.train.dead_feature_window_tokens

    def _statistics(self) -> dict[str, float | int]:
        """SAELens's figures of a trained SAE for its ``metadata``."""
        return {
            "training_steps": self.n_training_steps,
            "training_tokens": self.n_training_samples,
            "l0": float(self.feature_sparsity.sum()),
            "num_dead_features": int(self.dead_neurons.sum()),
        }

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _checkpoint_thresholds(self) -> list[int]:
        """Rows after which checkpoints are due, less those that are behind. SAELens's rule."""
        total = self.cfg.total_training_samples
        if not self.cfg.n_checkpoints:
            return []
        spaced = range(0, total, math.ceil(total / (self.cfg.n_checkpoints + 1)))[1:]
        return [rows for rows in spaced if rows >= self.n_training_samples]

    def save_checkpoint(self, checkpoint_name: str) -> Path:
        """Saves the SAE as it is now, and what it takes to go on training. All ranks call it.

        The folder ``checkpoint_path/checkpoint_name`` appears whole or not at all. It is that of a released SAE, which
        ``SAE.load_from_disk`` and SAELens's read; its ``state/`` is for ``load_trainer_state``, on any number of ranks.

        One of the same name is replaced.

        Raises:
            UserError: there is no checkpoint_path, no step was made, the name is none of a folder, the disk is full or
                cannot be written, or the SAE has diverged. On all ranks.
        """
        if self.cfg.checkpoint_path is None:
            raise UserError("checkpoint_path: None, so that there is no place for a checkpoint; name a folder")
        if not self.n_training_steps:
            raise UserError(f"checkpoint {checkpoint_name}: no step was made yet; save it after fit has begun")
        if checkpoint_name in ("", "..") or Path(checkpoint_name).name != checkpoint_name:
            raise UserError(f"checkpoint_name: {checkpoint_name!r} must be the name of a folder, without / and ..")
        base = Path(self.cfg.checkpoint_path)
        folder, aside = base / checkpoint_name, base / f".writing_{checkpoint_name}"
        state = aside / STATE
        self.job.check_replicas()
        self._agree(lambda: _renew(aside, state) if self.leads else None)
        before = self.sae.metadata
        self.sae.metadata = {**before, **self._statistics()}
        try:
            save_release(self.sae, aside, self.job.tensors(), self.job.scale.item(), self.job.target_scale.item())
        finally:
            self.sae.metadata = before
        sparsity = self.log_feature_sparsity
        merged = self._gather(self._agree(lambda: self._write_state(aside, sparsity)))
        self._agree(lambda: self._complete(aside, folder, merged) if self.leads else None)
        if self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=folder)
        return folder

    def _write_state(self, aside: Path, sparsity: Tensor) -> dict[str, Any]:
        """This rank's files of a checkpoint: their digests."""
        state = aside / STATE
        digests = checkpoint.save_rows(state, state, self.job.row_tensors(), self.job.start)
        if self.leads:
            save(aside / SPARSITY, {"sparsity": sparsity})
            digests |= checkpoint.save_replicated(state, state, self.job.replicated_tensors())
        return digests

    def _complete(self, aside: Path, folder: Path, digests: dict[str, Any]) -> None:
        """Puts a checkpoint in its place when all ranks' files are there."""
        checkpoint.mark(aside / STATE, digests, self._state_meta())
        checkpoint.put_in_place(aside, folder, folder.with_name(f".replaced_{folder.name}"))
        if self.log is not None:
            self.log.store(folder, "sae", [WEIGHTS_FILE, CFG_FILE, SPARSITY])

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Takes up the training where a checkpoint left it: weights, optimizer, counts. All ranks call it before `fit`.

        The provider is the script's own: let it yield the rows after the first ``n_samples_drawn``. These are more than
        ``n_training_samples`` where a scaling factor was found first.

        Raises:
            UserError: the folder is no checkpoint of a trainer, is damaged, or is of another SAE.
        """
        if self.n_training_steps:
            raise UserError(f"{checkpoint_path}: this trainer has trained already; load it into a new SAETrainer")
        folder = Path(checkpoint_path)
        meta = self.shard.agree(lambda: self._read_state(folder), str(folder))
        self.shard.agree(lambda: self.job.load(folder / STATE), str(folder))
        self.n_training_steps, self.n_training_samples = meta["n_training_steps"], meta["n_training_samples"]
        self.batches.n_taken = meta["n_samples_drawn"]
        self.n_non_finite = meta["n_non_finite"]
        if self.job.scales_inputs:
            self.activation_scaler.scaling_factor = self.job.scale.item()

    def _read_state(self, checkpoint_path: Path) -> dict[str, Any]:
        """What a checkpoint says of itself, after this rank's share of its files was checked."""
        state = checkpoint_path / STATE
        if not (state / checkpoint.META).is_file():
            raise UserError(f"{checkpoint_path}: holds no {STATE}/{checkpoint.META}; give a checkpoint of SAETrainer")
        if problems := checkpoint.verify(state, (self.shard.rank, self.shard.size)):
            raise UserError(f"{problems[0]}; go on from another checkpoint")
        meta = checkpoint.read_meta(state)
        if different := differences(meta["sae"], self.sae.cfg.to_dict(), "sae"):
            raise UserError(f"{checkpoint_path}: is of another SAE: {different[0]}; make the SAE with the same config")
        return meta

    def _state_meta(self) -> dict[str, Any]:
        return {
            "sae": self.sae.cfg.to_dict(),
            "trainer": asdict(self.cfg),
            "n_training_steps": self.n_training_steps,
            "n_training_samples": self.n_training_samples,
            "n_samples_drawn": self.n_samples_drawn,
            "n_non_finite": self.n_non_finite,
        }

    def _agree(self, attempt: Callable[[], R]) -> R:
        """Runs ``attempt`` on every rank; what a user can put right on one of them, its disk too, ends all."""
        return self.shard.agree(attempt, f"checkpoint_path: {self.cfg.checkpoint_path}")

    def _gather(self, digests: dict[str, Any]) -> dict[str, Any]:
        """The digests of all ranks' files."""
        if self.shard.size == 1:
            return digests
        parts: list[dict[str, Any]] = [{} for _ in range(self.shard.size)]
        dist.all_gather_object(parts, digests, group=self.shard.group)
        return {name: digest for part in parts for name, digest in part.items()}


def _check_sae(sae: Any) -> None:
    """UserError for an SAE that this trainer cannot train; a note where it is probably not what was meant."""
    if not isinstance(sae, TrainingSAE):
        raise UserError(
            f"sae: {type(sae).__name__} is none that trains; make it with TrainingSAE.from_dict(cfg.to_dict())"
        )
    if hasattr(sae.cfg, "d_out"):
        raise UserError(
            f"sae: {sae.cfg.architecture()} needs a target beside its input, which a data_provider does not give; "
            "train it with scale_sae.train"
        )
    for name, problem in sae.cfg.problems().items():
        raise UserError(f"sae.{name}: {getattr(sae.cfg, name)!r} {problem}")
    if sae.W_dec.dtype != sae.dtype:
        raise UserError(f"sae: has become {sae.W_dec.dtype}, but its config says {sae.dtype}; set dtype in its config")


def _check_launch(sae: TrainingSAE, cfg: SAETrainerConfig) -> None:
    """A note where the processes of a launch share nothing; UserError where they would write over one another."""
    rank, world_size, _ = topology.world_from_environment()
    if world_size == 1 or sae.shard.size > 1:
        return
    said = f"{world_size} processes were launched, but each trains an SAE of its own"
    remedy = "to share one between them, make it with TrainingSAE.from_dict(cfg, shard=launched_shard())"
    if cfg.checkpoint_path is not None:
        raise UserError(f"checkpoint_path: {cfg.checkpoint_path!r} would be written by all: {said}; {remedy}")
    if rank == 0:
        print(f"note: {said}; {remedy}", file=sys.stderr, flush=True)


def _renew(folder: Path, inner: Path) -> None:
    """Makes ``inner``, below ``folder``, of which nothing stays."""
    shutil.rmtree(folder, ignore_errors=True)
    inner.mkdir(parents=True)
