"""What a run trains: each entry of ``saes:`` at each of its hookpoints, as SAE jobs."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from scale_sae.activations.source import inspect_model, match_hookpoints
from scale_sae.config import RunConfig, TrainConfig
from scale_sae.config_schema import STREAM_KEYS
from scale_sae.errors import UserError
from scale_sae.saes import registry
from scale_sae.saes.base import TrainingSAEConfig
from scale_sae.topology import Job

# What an entry of ``saes`` may hold besides the options of its architecture.
ENTRY_KEYS = ("architecture", "name", "hookpoints", *(f.name for f in fields(TrainConfig) if f.name not in STREAM_KEYS))


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

    ``UserError`` for an unknown hookpoint, a pattern without a match, a bad SAE option, two SAEs of one hookpoint that
    do not both have a name of their own: they would be one folder, or one inside the other.
    """
    patterns = dict.fromkeys(pattern for entry in config.saes for pattern in config.hookpoints_of(entry))
    widths = inspect_model(config.model, list(patterns), config.topology.lm.tp)
    jobs: list[JobSpec] = []
    for index, entry in enumerate(config.saes):
        for hookpoint in match_hookpoints(config.hookpoints_of(entry), widths):
            key, d_in = f"saes.{index}", widths[hookpoint]
            cfg = registry.training_config(entry.architecture, d_in, entry.options, key, ENTRY_KEYS)
            sae_id = f"{hookpoint}/{entry.name}" if entry.name else hookpoint
            for job in jobs:
                if job.hookpoint == hookpoint and (job.sae_id == sae_id or hookpoint in (job.sae_id, sae_id)):
                    raise UserError(
                        f"{key}.name: {entry.name!r} beside saes.{job.entry} at {hookpoint}, which is {job.sae_id}; "
                        "give each SAE of a hookpoint a name of its own"
                    )
            jobs.append(JobSpec(sae_id, hookpoint, index, entry.architecture, cfg, config.train_of(entry)))
    return widths, jobs
