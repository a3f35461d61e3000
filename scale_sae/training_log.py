"""What `SAETrainer` says of a training: a progress bar, ``metrics.jsonl``, wandb. Names of metrics: SAELens's."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from scale_sae.metrics import RunLog, begin_wandb
from scale_sae.sae_trainer_config import SAETrainerConfig

METRICS = "metrics.jsonl"


class TrainingLog(RunLog):
    """The first rank's logs. A wandb run that the script has begun is used, and left open."""

    def __init__(self, cfg: SAETrainerConfig, step: int, sae_cfg: Mapping[str, Any]):
        """Goes on after ``step`` steps."""
        self.cfg = cfg
        path = None if cfg.checkpoint_path is None else Path(cfg.checkpoint_path) / METRICS
        begin = partial(self._wandb_run, sae_cfg) if cfg.logger.log_to_wandb else None
        batch = cfg.train_batch_size_samples
        super().__init__(path, "checkpoint_path", cfg.total_training_steps, batch, "row", step, begin)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs metrics after ``step`` steps: all to wandb, numbers and lists of them to the file."""
        plain = {name: value for name, value in values.items() if isinstance(value, int | float | list | str)}
        self.put(step, [{"step": step, "sae_id": "sae", **plain}], values)
        if "losses/overall_loss" in values:
            self.show([values])

    def store(self, folder: Path, name: str, files: list[str]) -> None:
        """Stores an SAE that was saved with wandb, as an artifact, if the config asks for it."""
        if self.wandb is None or not self.cfg.logger.log_weights_to_wandb:
            return
        import wandb

        artifact = wandb.Artifact(name, type="model", metadata=asdict(self.cfg))
        for file in files:
            artifact.add_file(str(folder / file))
        self.wandb.log_artifact(artifact, aliases=["latest", folder.name])

    def _wandb_run(self, sae_cfg: Mapping[str, Any]) -> Any:
        """The run that the script has begun, or a new one."""
        import wandb

        if wandb.run is not None:
            self.owns_wandb = False
            return wandb.run
        logger = self.cfg.logger
        return begin_wandb(
            "logger",
            project=logger.wandb_project,
            entity=logger.wandb_entity,
            name=logger.run_name,
            id=logger.wandb_id,
            dir=self.cfg.checkpoint_path,
            config={**asdict(self.cfg), "sae": dict(sae_cfg)},
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An evaluator's figures, nested ones under ``outer/inner``, tensors of one number as numbers."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        else:
            is_number = isinstance(value, Tensor) and value.numel() == 1
            found[f"{prefix}{name}"] = value.item() if is_number else value
    return found
