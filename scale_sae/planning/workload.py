"""What a run has to do, and which of its ranks do the same: what every estimate of a plan starts from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from scale_sae import engine_settings, topology
from scale_sae.activations.architecture import input_name, kept_positions
from scale_sae.activations.schedule import Schedule, schedule
from scale_sae.config import RunConfig, TopologyConfig, validate
from scale_sae.config_parsing import require
from scale_sae.jobs import JobSpec, resolve
from scale_sae.topology import Group, Plan


@dataclass(frozen=True)
class Role:
    """Ranks that hold and do the same, but for their numbers.

    Attributes:
        kind: what they run: SAE shards, the language model, or both (a colocated run).
        ranks: all of them, ascending.
        group: the SAE group of the first of them; None for LM ranks.
    """

    kind: str
    ranks: tuple[int, ...]
    group: Group | None

    @property
    def runs_lm(self) -> bool:
        return self.kind != "SAE"

    def __str__(self) -> str:
        return f"{self.kind} {'rank' if len(self.ranks) == 1 else 'ranks'} {_spans(self.ranks)}"


def _spans(ranks: tuple[int, ...]) -> str:
    """Ascending numbers as "0-7,16-23"."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


@dataclass(frozen=True)
class Workload:
    """A run on its topology. Pure: no processes, no weights.

    Attributes:
        widths: hookpoint → width of its activations.
        dtype: of the activations.
        positions: of one context that the model computes.
        rows_per_chunk: rows that a chunk gives, if no special token is left out but the BOS at the start of each
            context. Fewer come of short documents, so that a run forwards a little more text.
    """

    config: RunConfig
    widths: Mapping[str, int]
    specs: tuple[JobSpec, ...]
    schedule: Schedule
    plan: Plan
    dtype: torch.dtype
    positions: int
    rows_per_chunk: int

    @classmethod
    def of(cls, config: RunConfig) -> "Workload":
        """``UserError`` for whatever `scale_sae.train` would refuse before it loads weights."""
        widths, specs = resolve(config)
        engine_settings.check_jobs(config.topology, specs)
        kept = kept_positions(config.model, config.data)
        is_text = input_name(config.model) == "input_ids"
        bos = is_text and config.data.prepend_bos and config.data.exclude_special_tokens is True
        positions = list(config.data.seqpos_slice)
        first_is_kept = 0 in range(config.data.context_size)[slice(*positions)]
        given = kept - (bos and first_is_kept)
        remedy = (
            "keeps only the BOS, which is left out; keep further positions, or set data.exclude_special_tokens: false"
        )
        require(given > 0, "data.seqpos_slice", positions, remedy)
        return cls(
            config=config,
            widths=widths,
            specs=tuple(specs),
            schedule=schedule(config, kept),
            plan=topology.plan(config.topology, [spec.planned for spec in specs], config.buffer.lanes),
            dtype=getattr(torch, config.model.dtype),
            positions=config.data.context_size if is_text else kept,
            rows_per_chunk=config.data.chunk_contexts * given,
        )

    def on(self, laid_out: TopologyConfig) -> "Workload":
        """The same run on another topology. ``UserError`` where it cannot be; whether a model splits is not checked."""
        config = replace(self.config, topology=laid_out)
        validate(config)
        engine_settings.check_jobs(laid_out, self.specs)
        planned = topology.plan(laid_out, [spec.planned for spec in self.specs], config.buffer.lanes)
        return replace(self, config=config, plan=planned)

    @property
    def batch(self) -> int:
        """Rows of one step, over all ranks of a group."""
        return self.schedule.batch

    @property
    def chunks_per_step(self) -> Fraction:
        """Chunks that all copies of the language model together forward for one step."""
        return Fraction(self.batch, self.rows_per_chunk)

    @property
    def chunks(self) -> int:
        """Chunks that all copies of the language model forward in the whole run."""
        return -(-self.schedule.rows_needed // self.rows_per_chunk)

    def jobs_of(self, group: Group) -> list[JobSpec]:
        """The SAEs that ``group`` trains."""
        return [self.specs[index] for index in group.jobs]

    def roles(self) -> list[Role]:
        """Every kind of rank that there is, SAE ranks first; each rank is in one."""
        both = self.plan.colocated and self.config.topology.lm.cache is None
        alike: dict[object, list[Group]] = {}
        for group in self.plan.groups:
            jobs = tuple((spec.architecture, str(spec.cfg), str(spec.train)) for spec in self.jobs_of(group))
            widths = tuple(sorted(self.widths[name] for name in group.hookpoints))
            alike.setdefault((jobs, widths), []).append(group)
        found = [
            Role("SAE+LM" if both else "SAE", tuple(rank for group in groups for rank in group.ranks), groups[0])
            for groups in alike.values()
        ]
        if not self.plan.colocated:
            found.append(Role("LM", tuple(rank for ranks in self.plan.lm for rank in ranks), None))
        return found
