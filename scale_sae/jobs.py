"""What a run trains: each entry of ``saes:`` at each of its hookpoints, as SAE jobs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from scale_sae import recipes
from scale_sae.activations.source import fill_pattern, inspect_model, match_hookpoints
from scale_sae.config import InitFrom, RunConfig, SAEEntry, TrainConfig
from scale_sae.config_schema import STREAM_KEYS
from scale_sae.errors import UserError
from scale_sae.saes import registry
from scale_sae.saes.training_config import TrainingSAEConfig
from scale_sae.topology import Job

# What an entry of ``saes`` may hold besides the options of its architecture.
ENTRY_KEYS = (
    *(f.name for f in fields(SAEEntry) if f.name not in ("train", "options")),
    *(f.name for f in fields(TrainConfig) if f.name not in STREAM_KEYS),
)


@dataclass(frozen=True)
class JobSpec:
    """One SAE job. ``train`` holds the run's training settings with the entry's own in their place, and a rate.

    ``target`` is the hookpoint of what it reconstructs: ``hookpoint`` itself, but for transcoders.
    """

    sae_id: str
    hookpoint: str
    target: str
    entry: int
    architecture: str
    cfg: TrainingSAEConfig
    train: TrainConfig
    init_from: InitFrom | None

    @property
    def planned(self) -> Job:
        target = None if self.target == self.hookpoint else self.target
        cost = registry.training_class(self.architecture).multiply_adds(self.cfg)
        return Job(self.sae_id, self.hookpoint, cost, target)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the job (JSON-able)."""
        return {
            "sae_id": self.sae_id,
            "hookpoint": self.hookpoint,
            "target": self.target,
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
    widths = _inspect(config, patterns)
    jobs: list[JobSpec] = []
    for index, entry in enumerate(config.saes):
        hookpoints = match_hookpoints(config.hookpoints_of(entry), widths)
        train = config.train_of(entry)
        if train.lr is None:
            widest = max(widths[name] for name in hookpoints)
            train = replace(train, lr=recipes.learning_rate(entry.architecture, widest, entry.d_sae))
        for hookpoint in hookpoints:
            job = _job(config, index, hookpoint, widths, train)
            _check_folder(job, entry, jobs)
            jobs.append(job)
    used = {name for job in jobs for name in (job.hookpoint, job.target)}
    return {name: width for name, width in widths.items() if name in used}, jobs


def _inspect(config: RunConfig, patterns: Iterable[str]) -> dict[str, int]:
    """Hookpoint → width of all hookpoints that match ``patterns``, and of all targets."""
    targets = {target: index for index, entry in enumerate(config.saes) for target in config.targets_of(entry)}
    lm = config.topology.lm
    try:
        return inspect_model(config.model, [*patterns, *targets], lm.tp, lm.parallel)
    except UserError:
        for target, index in targets.items():  # each by itself, for a message that names its key
            try:
                inspect_model(config.model, [target])
            except UserError as error:
                raise UserError(str(error).replace("hookpoints:", f"saes.{index}.hookpoint_out:", 1)) from None
        raise


def with_rates(config: RunConfig, jobs: Iterable[JobSpec]) -> RunConfig:
    """``config``, of which ``jobs`` are all, with their learning rates in the entries that leave them to the width."""
    rates = {job.entry: job.train.lr for job in jobs}
    entries = [
        replace(entry, train=entry.train | {"lr": rates[index]}) if config.train_of(entry).lr is None else entry
        for index, entry in enumerate(config.saes)
    ]
    return replace(config, saes=tuple(entries))


def _job(config: RunConfig, index: int, hookpoint: str, widths: dict[str, int], train: TrainConfig) -> JobSpec:
    entry, key = config.saes[index], f"saes.{index}"
    cfg = registry.training_config(entry.architecture, widths[hookpoint], entry.options, key, ENTRY_KEYS)
    target = hookpoint
    if entry.hookpoint_out is not None:
        target = fill_pattern(config.targets_of(entry), config.hookpoints_of(entry), hookpoint)
        if target not in widths:
            raise UserError(f"{key}.hookpoint_out: {target}, for {hookpoint}, is no module of the model")
    if "d_out" in {f.name for f in fields(cfg)}:
        if entry.hookpoint_out is None:
            raise UserError(
                f"{key}.hookpoint_out: missing; name the hookpoint that the {entry.architecture} is to predict"
            )
        cfg = replace(cfg, d_out=_target_width(key, cfg.d_out, hookpoint, target, widths))
    elif entry.hookpoint_out is not None:
        raise UserError(
            f"{key}.hookpoint_out: {target} cannot be the target of {entry.architecture}, which reconstructs its "
            "input; remove the key, or choose a transcoder"
        )
    batch = config.train.train_batch_size_tokens
    if isinstance(k := getattr(cfg, "k", None), int | float) and k * batch < 1:
        raise UserError(f"{key}.k: {k} times {batch} rows is less than one active latent in a batch; raise it")
    sae_id = f"{hookpoint}/{entry.name}" if entry.name else hookpoint
    return JobSpec(sae_id, hookpoint, target, index, entry.architecture, cfg, train, entry.init_from)


def _target_width(key: str, d_out: int | None, hookpoint: str, target: str, widths: dict[str, int]) -> int:
    """d_out of a transcoder; ``UserError`` where it is wrong, or left out where it is not d_in."""
    width = widths[target]
    if d_out is None and width != widths[hookpoint]:
        raise UserError(
            f"{key}.d_out: missing; {hookpoint} has width {widths[hookpoint]} and {target} has width {width}, so set "
            f"d_out: {width}"
        )
    if d_out is not None and d_out != width:
        raise UserError(f"{key}.d_out: {d_out} must be {width}, the width of {target}")
    return width


def _check_folder(job: JobSpec, entry: SAEEntry, others: list[JobSpec]) -> None:
    for other in others:
        if other.hookpoint == job.hookpoint and (
            other.sae_id == job.sae_id or job.hookpoint in (other.sae_id, job.sae_id)
        ):
            raise UserError(
                f"saes.{job.entry}.name: {entry.name!r} beside saes.{other.entry} at {job.hookpoint}, which is "
                f"{other.sae_id}; give each SAE of a hookpoint a name of its own"
            )
