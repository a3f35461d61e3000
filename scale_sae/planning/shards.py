"""One SAE on one rank of its group: the sizes that its memory and its messages follow from."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from scale_sae.collectives import Ranks, Shard
from scale_sae.jobs import JobSpec
from scale_sae.planning.workload import Workload
from scale_sae.saes import registry
from scale_sae.saes.base import TrainingSAE
from scale_sae.saes.batchtopk import BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE
from scale_sae.saes.entrywise import EntrywiseTrainingSAE
from scale_sae.saes.topk import TopKTrainingSAE
from scale_sae.topology import Group


@dataclass(frozen=True)
class SAEShard:
    """What the last rank of a group has of one SAE: with Matryoshka widths it has the most levels' latents.

    Attributes:
        sae: a shard on the meta device, of the class that will train: parameters with sizes, without memory.
        rows: of a batch, on this rank: all that are not left out.
        batch: rows over all dp ranks.
        engine: that of the run; "local" where there is one dp rank and nothing to divide.
    """

    spec: JobSpec
    sae: TrainingSAE[Any]
    tp: int
    dp: int
    rows: int
    batch: int
    engine: str

    @classmethod
    def of(cls, w: Workload, spec: JobSpec, group: Group) -> "SAEShard":
        """``spec`` on a rank of ``group``."""
        shard = Shard(group.tp - 1, group.tp, dp=Ranks(group.dp - 1, group.dp))
        sae = registry.create(spec.architecture, spec.cfg, shard, "meta")
        sae.pre_activation_bytes = w.config.topology.pre_activation_mib * 2**20
        return cls(spec, sae, group.tp, group.dp, w.batch // group.dp, w.batch, w.plan.engine)

    @property
    def cfg(self) -> Any:
        """The SAE's options, of its own class."""
        return self.spec.cfg

    @property
    def d_in(self) -> int:
        return self.spec.cfg.d_in

    @property
    def d_out(self) -> int:
        return self.sae.d_out

    @property
    def latents(self) -> int:
        """Of this shard."""
        return self.sae.n_local

    @property
    def itemsize(self) -> int:
        """Bytes of a number that the SAE computes with."""
        return self.sae.dtype.itemsize

    @property
    def wide(self) -> int:
        """Bytes of a number of sums, gradients and masters: of float32 at least."""
        return torch.promote_types(self.sae.dtype, torch.float32).itemsize

    @cached_property
    def kind(self) -> Literal["codes", "entries", "dense"]:
        """What its step computes on: selected codes, entries that may be active, or all (classes of one's own)."""
        if isinstance(self.sae, TopKTrainingSAE) and self.sae.works_on_codes():
            return "codes"
        return "entries" if isinstance(self.sae, EntrywiseTrainingSAE) and self.sae.works_on_entries() else "dense"

    @property
    def selects(self) -> Literal["rows", "batch"] | None:
        """Whether it chooses active latents among those of a row, or of the whole batch."""
        if isinstance(self.sae, BatchTopKTrainingSAE):
            return "batch"
        return "rows" if isinstance(self.sae, TopKTrainingSAE) else None

    @property
    def selected(self) -> int:
        """Entries that a batch selects, over all shards and dp ranks."""
        return int(self.cfg.k * self.batch)

    @property
    def block_rows(self) -> int:
        """Rows of pre-activations that exist at once."""
        return min(self.rows, self.sae.block_rows(self.latents))

    @property
    def k_aux(self) -> int:
        """The most dead latents that a row's residual is given to; 0 without AuxK."""
        return self.sae.k_aux if isinstance(self.sae, TopKTrainingSAE) else 0

    @property
    def levels(self) -> int:
        """Reconstructions of a batch: one, but for Matryoshka SAEs."""
        return len(self.sae.level_ends()) if isinstance(self.sae, TopKTrainingSAE) else 1

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.sae.named_parameters())

    @property
    def matrices(self) -> dict[str, Tensor]:
        """Those with a row per latent."""
        names = self.parameters.keys() - self.sae.replicated
        return {name: tensor for name, tensor in self.parameters.items() if name in names and tensor.dim() == 2}

    @cached_property
    def divided(self) -> dict[str, Tensor]:
        """Those whose rows the dp ranks divide, as ``DividingEngine`` does."""
        if self.engine == "local":
            return {}
        kept = self.sae.replicated
        return {name: p for name, p in self.parameters.items() if name not in kept and p.dtype == self.sae.dtype}

    @property
    def undivided(self) -> dict[str, Tensor]:
        """Those that every dp rank has whole."""
        return {name: tensor for name, tensor in self.parameters.items() if name not in self.divided}

    @property
    def may_have_dead(self) -> bool:
        """Whether the run is long enough for a latent to count as dead."""
        return self.spec.train.training_tokens - self.batch > self.spec.train.dead_feature_window_tokens

    def aux_parts(self, dead: int) -> list[int]:
        """Dead latents of each group of them that reconstructs a residual, if ``dead`` lie evenly among all latents."""
        if not dead or not isinstance(self.sae, TopKTrainingSAE) or not self.cfg.aux_loss_coefficient:
            return []
        if not self.divides_aux:
            return [dead]
        ends = [0, *self.cfg.widths]
        return [-(-dead * (end - start) // ends[-1]) for start, end in pairwise(ends)]

    @property
    def divides_aux(self) -> bool:
        """Whether each level's dead latents reconstruct for themselves."""
        return isinstance(self.sae, MatryoshkaBatchTopKTrainingSAE) and self.cfg.use_matryoshka_aux_loss


def numbers(tensors: dict[str, Tensor]) -> int:
    """Elements of all of them."""
    return sum(tensor.numel() for tensor in tensors.values())
