"""The settings of `SAETrainer`: names, meanings and defaults are SAELens's, but where a comment says otherwise."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

import torch

from scale_sae.config import TrainConfig
from scale_sae.config_parsing import convert, require
from scale_sae.errors import UserError


@dataclass
class LoggingConfig:
    """What is sent to Weights & Biases, and how often anything is logged.

    ``metrics.jsonl`` in the checkpoint folder, the progress bar and evaluations do not depend on wandb.
    """

    log_to_wandb: bool = True
    # Nothing reads these two, here as in SAELens; only their default is accepted.
    log_activations_store_to_wandb: bool = False
    log_optimizer_state_to_wandb: bool = False
    # Also store every checkpoint's SAE, as an artifact.
    log_weights_to_wandb: bool = True
    wandb_project: str = "sae_lens_training"
    # The id of the wandb run; None: a new one.
    wandb_id: str | None = None
    run_name: str | None = None
    wandb_entity: str | None = None
    # Steps between two logs.
    wandb_log_frequency: int = 10
    # Logs between two evaluations.
    eval_every_n_wandb_logs: int = 100

    def __post_init__(self) -> None:
        """UserError for a value that cannot be worked with."""
        _convert_fields(self, "logger.")
        for name in ("log_activations_store_to_wandb", "log_optimizer_state_to_wandb"):
            require(not getattr(self, name), f"logger.{name}", True, "logs nothing, in SAELens neither; leave it out")
        for name in ("wandb_log_frequency", "eval_every_n_wandb_logs"):
            require(getattr(self, name) > 0, f"logger.{name}", getattr(self, name), "must be above 0")


@dataclass
class SAETrainerConfig:
    """How an SAE is trained on batches that a data provider yields."""

    # Rows to train on, at least: the last batch is a whole one too.
    total_training_samples: int
    # Rows per step; the provider's batches are cut and joined to this size.
    train_batch_size_samples: int
    lr: float = 3e-4
    # Where the cosine schedules and the decay end; None: lr / 10.
    lr_end: float | None = None
    lr_scheduler_name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant"
    lr_warm_up_steps: int = 0
    lr_decay_steps: int = 0
    n_restart_cycles: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    # Where the SAE goes; "cuda" is this process's own GPU.
    device: str = "cpu"
    # Only False: an SAE of dtype bfloat16 computes in bfloat16, with float32 masters.
    autocast: bool = False
    # Steps without firing after which a latent is dead.
    dead_feature_window: int = 1000
    # Steps over which firing frequencies are counted before they start anew.
    feature_sampling_window: int = 2000
    # Checkpoints on the way, evenly spaced, in checkpoint_path.
    n_checkpoints: int = 0
    checkpoint_path: str | None = None
    # Also one at the end.
    save_final_checkpoint: bool = False
    logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))
    # Batches that are drawn, and not trained on, for the factor of normalize_activations: expected_average_only_in.
    n_batches_for_norm_estimate: int = 1000

    def __post_init__(self) -> None:
        """UserError for a value that cannot be worked with."""
        _convert_fields(self, "")
        remedy = "is not there; set the SAE's dtype to bfloat16 (it computes in bfloat16 and keeps float32 masters)"
        require(not self.autocast, "autocast", self.autocast, remedy)
        for name in (
            *("total_training_samples", "train_batch_size_samples", "lr", "n_restart_cycles"),
            *("feature_sampling_window", "n_batches_for_norm_estimate"),
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        for name in ("lr_warm_up_steps", "lr_decay_steps", "dead_feature_window", "n_checkpoints"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be at least 0")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be at least 0 and below 1")
        require(self.lr_end is None or self.lr_end >= 0, "lr_end", self.lr_end, "must be at least 0, or None")
        self._check_schedule()
        wanted = "n_checkpoints" if self.n_checkpoints else "save_final_checkpoint"
        remedy = f"must name a folder, since {wanted} is {getattr(self, wanted)}"
        saves = bool(self.n_checkpoints) or self.save_final_checkpoint
        require(self.checkpoint_path is not None or not saves, "checkpoint_path", None, remedy)
        self._check_device()

    def _check_schedule(self) -> None:
        steps, warm_up = self.total_training_steps, self.lr_warm_up_steps
        remedy = f"and lr_warm_up_steps {warm_up} are more than the {steps} steps of the training; lower one of them"
        require(warm_up + self.lr_decay_steps <= steps, "lr_decay_steps", self.lr_decay_steps, remedy)
        if self.lr_scheduler_name == "cosineannealingwarmrestarts":
            between = steps - warm_up - self.lr_decay_steps
            remedy = f"is more than the {between} steps between warm-up and decay"
            require(self.n_restart_cycles <= between, "n_restart_cycles", self.n_restart_cycles, remedy)

    def _check_device(self) -> None:
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            said = str(error).splitlines()[0].rstrip(".")
            raise UserError(
                f"device: {self.device!r} cannot be used ({said}); set cpu, or cuda where there is a GPU"
            ) from None

    @property
    def total_training_steps(self) -> int:
        """Steps until ``total_training_samples`` are trained on; SAELens's count leaves a last, partial batch out."""
        return math.ceil(self.total_training_samples / self.train_batch_size_samples)

    @property
    def for_command(self) -> TrainConfig:
        """The same settings in the words of a config file, whose windows count rows."""
        batch = self.train_batch_size_samples
        return TrainConfig(
            training_tokens=self.total_training_steps * batch,
            train_batch_size_tokens=batch,
            lr=self.lr,
            lr_end=self.lr_end,
            lr_scheduler_name=self.lr_scheduler_name,
            n_restart_cycles=self.n_restart_cycles,
            lr_warm_up_steps=self.lr_warm_up_steps,
            lr_decay_steps=self.lr_decay_steps,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            dead_feature_window_tokens=self.dead_feature_window * batch,
            feature_sampling_window=self.feature_sampling_window,
        )


def _convert_fields(cfg: Any, prefix: str) -> None:
    """Checks every field against its type, in place. ``prefix`` stands before its name in a UserError."""
    hints = get_type_hints(type(cfg))
    for f in fields(cfg):
        if f.name != "logger":
            setattr(cfg, f.name, convert(getattr(cfg, f.name), hints[f.name], prefix + f.name))
        elif not isinstance(cfg.logger, LoggingConfig):
            raise UserError(f"logger: {type(cfg.logger).__name__} must be a scale_sae.LoggingConfig")
