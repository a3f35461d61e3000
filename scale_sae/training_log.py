"""What `SAETrainer` says of a training: a progress bar, ``metrics.jsonl``, wandb. Names of metrics: SAELens's."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from scale_sae.metrics import begin_wandb, for_wandb
from scale_sae.progress import progress_bar
from scale_sae.sae_trainer_config import SAETrainerConfig

METRICS = "metrics.jsonl"


class TrainingLog:
    """The first rank's logs, as a context. A wandb run that the script has begun is used, and left open."""

    def __init__(self, cfg: SAETrainerConfig, step: int, sae_cfg: Mapping[str, Any]):
        """Goes on after ``step`` steps: what ``metrics.jsonl`` holds of later ones is dropped."""
        self.cfg = cfg
        self.file = None
        if cfg.checkpoint_path is not None:
            path = Path(cfg.checkpoint_path) / METRICS
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = path.read_text().splitlines() if step and path.exists() else []
            self.file = path.open("w")
            self.file.writelines(f"{line}\n" for line in kept if _step_of(line) <= step)
        self.wandb, self.owns_run = None, False
        if cfg.logger.log_to_wandb:
            self.wandb, self.owns_run = _wandb_run(cfg, sae_cfg)
        batch = cfg.train_batch_size_samples
        self.bar = progress_bar(cfg.total_training_steps * batch, "training", "row", step * batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.wandb is not None and self.owns_run:
            self.wandb.finish(exit_code=int(error is not None))

    def advance(self) -> None:
        """One step more."""
        self.bar.update(self.cfg.train_batch_size_samples)

    def say(self, line: str) -> None:
        """A line on stderr that does not break the bar."""
        self.bar.write(line, file=self.bar.fp)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs metrics after ``step`` steps: all to wandb, numbers and lists of them to the file."""
        if self.file is not None:
            plain = {name: value for name, value in values.items() if isinstance(value, int | float | list | str)}
            self.file.write(json.dumps({"step": step, "sae_id": "sae", **plain}) + "\n")
            self.file.flush()
        if self.wandb is not None:
            self.wandb.log({name: for_wandb(name, value) for name, value in values.items()}, step=step)
        if "losses/overall_loss" in values:
            self.bar.set_postfix(
                {
                    "loss": f"{values['losses/overall_loss']:.3g}",
                    "L0": f"{values['metrics/l0']:.1f}",
                    "EV": f"{values['metrics/explained_variance']:.3f}",
                    "dead": f"{values['sparsity/dead_features']:.0f}",
                },
                refresh=False,
            )

    def store(self, folder: Path, name: str, files: list[str]) -> None:
        """Stores an SAE that was saved with wandb, as an artifact, if the config asks for it."""
        if self.wandb is None or not self.cfg.logger.log_weights_to_wandb:
            return
        import wandb

        artifact = wandb.Artifact(name, type="model", metadata=asdict(self.cfg))
        for file in files:
            artifact.add_file(str(folder / file))
        self.wandb.log_artifact(artifact, aliases=["latest", folder.name])


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


def _step_of(line: str) -> float:
    """The step of a line of ``metrics.jsonl``; infinite for half a line, which a killed run leaves."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _wandb_run(cfg: SAETrainerConfig, sae_cfg: Mapping[str, Any]) -> tuple[Any, bool]:
    """The run that the script has begun, or a new one; whether it is a new one."""
    import wandb

    if wandb.run is not None:
        return wandb.run, False
    logger = cfg.logger
    run = begin_wandb(
        "logger",
        project=logger.wandb_project,
        entity=logger.wandb_entity,
        name=logger.run_name,
        id=logger.wandb_id,
        dir=cfg.checkpoint_path,
        config={**asdict(cfg), "sae": dict(sae_cfg)},
    )
    return run, True
