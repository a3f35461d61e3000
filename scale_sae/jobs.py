"""What a run trains: each entry of ``saes:`` at each of its hookpoints, as SAE jobs."""

from dataclasses import asdict, dataclass
from typing import Any

from scale_sae.activations.source import inspect_model, match_hookpoints
from scale_sae.config import RunConfig, TrainConfig
from scale_sae.errors import UserError
from scale_sae.saes import registry
from scale_sae.saes.base import TrainingSAEConfig
from scale_sae.topology import Job


@dataclass(frozen=True)
class JobSpec:
    """One SAE job. ``train`` holds the run's training settings with the entry's own in their place."""

    sae_id: str
    hookpoint: str
    entry: int
    architecture: str
    cfg: TrainingSAEConfig
    train: TrainConfig

    @property
    def planned(self) -> Job:
        return Job(self.sae_id, self.hookpoint, self.cfg.d_in * self.cfg.d_sae)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the job (JSON-able)."""
        return {
            "sae_id": self.sae_id,
            "hookpoint": self.hookpoint,
            "entry": self.entry,
            "architecture": self.architecture,
            "d_in": self.cfg.d_in,
            "d_sae": self.cfg.d_sae,
            "cfg": asdict(self.cfg),
        }


def resolve(config: RunConfig) -> tuple[dict[str, int], list[JobSpec]]:
    """(hookpoint → width in model order, the jobs of the run). Loads no weights.

    ``UserError`` for an unknown hookpoint, a pattern without a match, a bad SAE option, two jobs of one sae_id.
    """
    patterns = dict.fromkeys(pattern for entry in config.saes for pattern in config.hookpoints_of(entry))
    widths = inspect_model(config.model, list(patterns), config.topology.lm.tp)
    jobs: list[JobSpec] = []
    for index, entry in enumerate(config.saes):
        for hookpoint in match_hookpoints(config.hookpoints_of(entry), widths):
            cfg = registry.training_config(entry.architecture, widths[hookpoint], entry.options, f"saes.{index}")
            sae_id = f"{hookpoint}/{entry.name}" if entry.name else hookpoint
            if any(job.sae_id == sae_id for job in jobs):
                raise UserError(
                    f"saes.{index}.name: a second SAE at {hookpoint} would be {sae_id!r} too; give each a name"
                )
            jobs.append(JobSpec(sae_id, hookpoint, index, entry.architecture, cfg, config.train_of(entry)))
    return widths, jobs
